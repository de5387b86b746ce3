"""What a run leaves for others."""
