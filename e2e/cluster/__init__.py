"""A real single-node Kubernetes without Docker: `python3 -m e2e.cluster up|images|deploy|down`, standard library only."""
