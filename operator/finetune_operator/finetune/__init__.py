"""FineTune: from the object to Jobs and back to its status."""

from finetune_operator.finetune.reconcile import reconcile

__all__ = ["reconcile"]
