"""Where inputs come from: base models and datasets, on a hub, behind a URL, in a bucket or on a volume."""
