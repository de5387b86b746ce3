"""Configurations of other tools as FineTunes: what means the same is carried over, what does not is said."""
