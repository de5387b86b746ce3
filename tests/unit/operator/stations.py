"""FineTunes at the stations of their way, each with the Jobs that it has had until then."""

from typing import Any

from finetune_operator.api.finetune import FineTune
from finetune_operator.finetune.plan import Plan
from tests.unit.operator.wrappers import (
    Object,
    ended,
    failed,
    finetune,
    prepared,
    seen,
    stored,
    terminated,
    trained,
    with_status,
)


def in_preparation(**spec: Any) -> tuple[FineTune, Object]:
    """A FineTune whose prepare Job was created, and that Job."""
    parent = finetune(**spec)
    made = seen(parent)
    return with_status(parent, made), stored(made.create)


def in_training(**spec: Any) -> tuple[FineTune, Object, Object]:
    """A FineTune whose first train Job was created, its prepare Job and its train Job."""
    parent, prepare = in_preparation(**spec)
    made = seen(parent, [prepare], [terminated(prepare, result=prepared(prepare))])
    return with_status(parent, made), ended(prepare, "Complete"), stored(made.create)


def just_trained(result: Object | None = None, **spec: Any) -> tuple[FineTune, list[Object], Plan]:
    """A FineTune whose training has just ended, its Jobs, and what was planned then; `result`: of the training."""
    parent, prepare, train = in_training(**spec)
    made = seen(parent, [prepare, train], [terminated(train, result=trained(train, **(result or {})))])
    return with_status(parent, made), [prepare, ended(train, "Complete")], made


def succeeded(**spec: Any) -> tuple[FineTune, list[Object]]:
    parent, jobs, _ = just_trained(**spec)
    return parent, jobs


def failed_run(reason: str = "InvalidDataset", **spec: Any) -> tuple[FineTune, Object, Plan]:
    """A FineTune whose prepare Job has failed, that Job, and what was planned then."""
    parent, prepare = in_preparation(**spec)
    made = seen(parent, [ended(prepare)], [terminated(prepare, 1, failed(prepare, reason))])
    return with_status(parent, made), ended(prepare), made
