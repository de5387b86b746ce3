"""What pods report about themselves: the newest report of each, and the HTTP server that takes them in.

The store is memory only. Nothing is lost with it: a run's result is also its container's termination message, and
an agent reports again within seconds.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import web

from finetune_operator import metrics
from finetune_operator.kube import ADAPTERDEPLOYMENTS, FINETUNES, ApiError, Object
from finetune_operator.queue import Key, WorkQueue
from finetune_operator.report import Report
from finetune_operator.tokens import Refused, Sender, Tokens

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 * 1024
# However often pods report, one object is looked at at most once a second because of it.
PACE_SECONDS = 1.0

_KINDS = {resource.plural: resource.kind for resource in (FINETUNES, ADAPTERDEPLOYMENTS)}


class Reports:
    """The newest report per object and pod, and per AdapterDeployment the answer that its agents get."""

    def __init__(self, queue: WorkQueue, now: Callable[[], dt.datetime]) -> None:
        self._queue, self._now = queue, now
        self._reports: dict[Key, dict[str, Report]] = {}
        self._desired: dict[Key, Object] = {}
        self._seen: dict[Key, dt.datetime] = {}

    def of(self, key: Key) -> dict[str, Report]:
        """The newest report of each pod of this object, by pod name."""
        return dict(self._reports.get(key, {}))

    def put(self, key: Key, sender: Sender, body: Object) -> None:
        """Keep a report and have the object looked at."""
        now = self._now()
        pods = self._reports.setdefault(key, {})
        before = pods.get(sender.pod)
        if before is not None and before.pod_uid == sender.pod_uid:
            # A result comes without progress, and progress may come after the result: neither may wipe the other.
            body = {**before.body, **body}
        pods[sender.pod] = Report(sender.pod, sender.pod_uid, sender.job, sender.job_uid, body, now)
        if before is not None and before.pod_uid == sender.pod_uid and before.body == body:
            return  # a sign of life and nothing else: agents send one every few seconds
        last = self._seen.get(key)
        if body.get("result") or last is None or (now - last).total_seconds() >= PACE_SECONDS:
            self._seen[key] = now
            self._queue.add(key)
        else:
            self._queue.add_after(key, PACE_SECONDS)

    def set_desired(self, key: Key, desired: Object) -> None:
        """What the agents of this AdapterDeployment are answered from now on."""
        self._desired[key] = desired

    def desired(self, key: Key) -> Object:
        """Empty until the object has been looked at once: agents then go on with what their ConfigMap says."""
        return self._desired.get(key, {})

    def keep_only(self, key: Key, pods: set[str]) -> None:
        """Drop the reports of pods that are gone."""
        for pod in self._reports.get(key, {}).keys() - pods:
            del self._reports[key][pod]

    def forget(self, key: Key) -> None:
        """The object is gone."""
        self._reports.pop(key, None)
        self._desired.pop(key, None)
        self._seen.pop(key, None)


def application(reports: Reports, tokens: Tokens, leading: Callable[[], bool]) -> web.Application:
    """The report server: POST /apis/finetune.dev/v1alpha1/namespaces/<namespace>/<plural>/<name>/report."""

    async def receive(request: web.Request) -> web.Response:
        plural = request.match_info["plural"]
        kind = _KINDS.get(plural)
        if kind is None:
            return _refuse(plural, 404, f"{plural}: no such kind, use one of {', '.join(_KINDS)}")
        key = Key(kind, request.match_info["namespace"], request.match_info["name"])
        if not leading():
            # Only a client that kept a connection open to a former leader gets here; the Service names the new one.
            return _refuse(kind, 503, "this replica is not the leader, connect again", close=True)
        try:
            sender = await tokens.sender(request.headers.get("Authorization", ""))
            tokens.check(sender, key)
            body = _body(await request.read(), sender)
        except Refused as refused:
            log.warning("report refused for %s: %s", key, refused)
            return _refuse(kind, refused.status, str(refused))
        except ApiError as error:
            log.warning("report for %s not verified: %s", key, error)
            return _refuse(kind, 503, "the token could not be reviewed, report again")
        reports.put(key, sender, body)
        metrics.reports.labels(kind, "accepted").inc()
        return web.json_response(reports.desired(key))

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/apis/finetune.dev/v1alpha1/namespaces/{namespace}/{plural}/{name}/report", receive)
    return app


def _body(raw: bytes, sender: Sender) -> Object:
    try:
        body: Any = json.loads(raw)
    except ValueError as error:
        raise Refused(400, f"the report is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused(400, f"the report must be a JSON object, is {type(body).__name__}")
    if sender.job and body.get("job") != sender.job:
        raise Refused(403, f"the report is about Job {body.get('job')!r}, the pod belongs to Job {sender.job!r}")
    return body


def _refuse(kind: str, status: int, message: str, *, close: bool = False) -> web.Response:
    metrics.reports.labels(kind if kind in _KINDS.values() else "unknown", "refused").inc()
    response = web.json_response({"message": message}, status=status)
    if close:
        response.force_close()
    return response
