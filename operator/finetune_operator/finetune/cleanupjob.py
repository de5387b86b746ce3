"""Builds the Job that deletes a deleted FineTune's artifacts, as a plain dict."""

from __future__ import annotations

from typing import Any

from finetune_operator import labels, podtemplate, restricted
from finetune_operator.api.finetune import FineTune
from finetune_operator.finetune import volumes
from finetune_operator.finetune.jobs import CONTAINER, storage_environment, storage_of
from finetune_operator.settings import Settings
from finetune_trainer.cleanupspec import CleanupSpec

Object = dict[str, Any]

STAGE = "cleanup"
#: A bucket that does not answer, an image that cannot be pulled, a Secret that is gone: the Job ends all the same.
DEADLINE_SECONDS = 300
#: Its log stays that long.
KEPT_SECONDS = 600


def job(parent: FineTune, uris: tuple[str, ...], attempt: int, settings: Settings) -> Object:
    """One try to delete the folders at `uris`.

    Without an owner reference: whoever deletes in the foreground, as Argo CD does, has the garbage collector delete
    what the FineTune owns before the FineTune, this Job among it. Without a queue: nothing but Kueue would start it then.
    """
    meta = parent.metadata
    spec = CleanupSpec(storage=storage_of(parent.spec, settings), uris=list(uris))
    identity = {
        **labels.of_owner("FineTune", meta.name),
        labels.STAGE: STAGE,
        labels.ATTEMPT: str(attempt),
        labels.OWNER_UID: meta.uid,
    }
    mounted = volumes.of_cleanup()
    pod = {
        "metadata": {
            "labels": identity,
            "annotations": {labels.RUN_SPEC: spec.model_dump_json(by_alias=True, exclude_none=True)},
        },
        "spec": {
            "restartPolicy": "Never",
            "imagePullSecrets": [{"name": name} for name in settings.images.pull_secrets],
            **restricted.pod(),
            "containers": [
                {
                    "name": CONTAINER,
                    "image": settings.images.trainer,
                    "imagePullPolicy": settings.images.pull_policy,
                    "args": [STAGE, "--spec", volumes.SPEC_FILE],
                    "env": storage_environment(parent.spec, settings),
                    "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "securityContext": restricted.container(),
                    "volumeMounts": [mount for _, mount in mounted],
                }
            ],
            "volumes": [volume for volume, _ in mounted],
        },
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{meta.name}-{STAGE}-{meta.uid[:8]}-{attempt}",
            "namespace": meta.namespace,
            "labels": identity,
        },
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": DEADLINE_SECONDS,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": podtemplate.merge(parent.spec.pod_template, pod, CONTAINER),
        },
    }
