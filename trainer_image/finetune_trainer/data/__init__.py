"""From files of rows to the batches of the training loop."""
