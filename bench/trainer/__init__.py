"""Our trainer beside what people would run instead: the same model, data, batch and steps."""
