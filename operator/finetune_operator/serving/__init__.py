"""AdapterDeployment: which adapters are to be served, the Deployment that serves them, and what is true of it."""

from finetune_operator.serving.reconcile import reconcile

__all__ = ["reconcile"]
