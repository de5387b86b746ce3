"""The two kinds of group finetune.dev as frozen pydantic models: types only, shared by operator, trainer and agent."""

from finetune_operator.api.adapterdeployment import AdapterDeployment
from finetune_operator.api.common import GROUP, VERSION
from finetune_operator.api.finetune import FineTune

__all__ = ["GROUP", "VERSION", "AdapterDeployment", "FineTune"]
