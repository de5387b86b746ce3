"""How a model is adapted: from `method` to an adapter, and to a form that others can load."""
