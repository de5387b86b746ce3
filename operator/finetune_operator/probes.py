"""GET /healthz, /readyz and /metrics, on every replica."""

from __future__ import annotations

import time

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_operator.leader import Lease
from finetune_operator.workers import Workers

# A replica that cannot reach the API server is not ready, but restarting it would not help.
CONTACT_SECONDS = 30.0
# No look at an object takes this long, since every request in it has a time limit: a worker that does is stuck.
STUCK_SECONDS = 300.0


def application(lease: Lease, workers: Workers) -> web.Application:
    async def healthz(_: web.Request) -> web.Response:
        busiest = workers.longest_busy_seconds()
        if busiest > STUCK_SECONDS:
            return web.Response(status=500, text=f"a worker has been at one object for {busiest:.0f} s\n")
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        silence = time.monotonic() - lease.last_contact
        if silence > CONTACT_SECONDS:
            return web.Response(status=503, text="no answer from the API server about the lease\n")
        return web.Response(text="leading\n" if lease.held() else "standing by\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app
