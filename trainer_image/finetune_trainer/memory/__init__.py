"""What a run needs of a GPU, known before one is asked for."""
