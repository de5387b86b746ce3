"""What runs beside and inside vLLM: an agent that loads verified adapters, a middleware that maps names to digests."""
