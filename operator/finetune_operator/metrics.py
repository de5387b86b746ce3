"""Every metric of the operator, in Prometheus' words; label values are bounded (kinds, phases, results)."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_PREFIX = "finetune_operator"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

reconciles = Counter(f"{_PREFIX}_reconcile_total", "Looks at an object, by outcome.", ["kind", "result"])
reconcile_seconds = Histogram(
    f"{_PREFIX}_reconcile_duration_seconds", "One look at an object.", ["kind"], buckets=_SECONDS
)
queue_depth = Gauge(f"{_PREFIX}_workqueue_depth", "Objects that wait for a worker.")
queue_adds = Counter(f"{_PREFIX}_workqueue_adds_total", "Objects put in the queue.", ["kind"])
queue_retries = Counter(f"{_PREFIX}_workqueue_retries_total", "Objects put back after an error.", ["kind"])
api_requests = Counter(f"{_PREFIX}_api_requests_total", "Requests to the API server.", ["method", "code"])
reports = Counter(f"{_PREFIX}_reports_total", "Reports pushed by pods, by outcome.", ["kind", "result"])
jobs_created = Counter(f"{_PREFIX}_jobs_created_total", "Jobs created.", ["stage"])
attempts_failed = Counter(f"{_PREFIX}_attempts_failed_total", "Attempts that failed, by reason.", ["reason"])
leading = Gauge(f"{_PREFIX}_leading", "1 while this process holds the lease.")
objects = Gauge(f"{_PREFIX}_objects", "Objects by kind and phase.", ["kind", "phase"])


class PhaseCount:
    """Keeps `objects` right: every object counts in exactly one phase."""

    def __init__(self) -> None:
        self._phase: dict[tuple[str, str, str], str] = {}

    def set(self, kind: str, namespace: str, name: str, phase: str | None) -> None:
        """`phase` None: the object is gone."""
        key = (kind, namespace, name)
        before = self._phase.get(key)
        if before == phase:
            return
        if before is not None:
            objects.labels(kind, before).dec()
        if phase is None:
            self._phase.pop(key, None)
            return
        self._phase[key] = phase
        objects.labels(kind, phase).inc()


phases = PhaseCount()
