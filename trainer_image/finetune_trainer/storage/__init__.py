"""The object store, and a folder in place of one."""
