"""How good an adapter is, and whether that is good enough."""
