"""The operator as a process: its servers run on every replica, its workers and watches on the leader."""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import uuid
from typing import Any

import kopf
from aiohttp import web
from kubernetes.aio.client.api_client import ApiClient

from finetune_operator import endpoint, finetune, main, probes, reports, serving, workers
from finetune_operator.api.common import GROUP, VERSION
from finetune_operator.context import Context
from finetune_operator.endpoint import Place
from finetune_operator.events import Events
from finetune_operator.followers import Followers
from finetune_operator.kube import ADAPTERDEPLOYMENTS, FINETUNES, Kube, configuration
from finetune_operator.leader import Lease, lead
from finetune_operator.queue import WorkQueue
from finetune_operator.settings import Settings, SettingsError
from finetune_operator.times import utc_now
from finetune_operator.tokens import Tokens

log = logging.getLogger(__name__)

LEASE = "finetune-operator"
RECONCILES = {
    FINETUNES.kind: finetune.reconcile,
    ADAPTERDEPLOYMENTS.kind: serving.reconcile,
}


async def run(settings: Settings, place: Place) -> None:
    """Serve, wait for the lease, work until told to stop."""
    stop = asyncio.Event()
    _stop_on_signals(stop)
    loaded = await configuration()
    async with ApiClient(loaded) as client:
        unfenced = Kube(client)
        await _require_crds(unfenced)
        lease = Lease(unfenced, place.namespace, LEASE, f"{place.pod}_{uuid.uuid4().hex[:8]}")
        kube = Kube(client, lease.fence)
        queue = WorkQueue()
        context = Context(
            kube=kube,
            settings=settings,
            events=Events(kube, place.pod, utc_now),
            reports=reports.Reports(queue, utc_now),
            queue=queue,
            now=utc_now,
        )
        crew = workers.Workers(context, RECONCILES)
        tls = _tls(settings)
        report_server = reports.application(context.reports, Tokens(kube), lease.held)
        servers = [
            await _serve(probes.application(lease, crew), settings.health_port, None),
            await _serve(report_server, settings.reports.port, tls),
        ]

        async def announce() -> None:
            if tls is not None:
                try:
                    _load_certificate(tls, settings)
                except SettingsError as error:
                    log.error("%s; the former certificate is shown until it can", error)
            await endpoint.announce(kube, place, settings.reports.service, settings.reports.port)

        async def work() -> None:
            await announce()
            # Before kopf's own tasks: kopf cancels in the end whatever was started after it.
            crewing = asyncio.create_task(crew.run(settings.workers))
            resyncing = asyncio.create_task(workers.resync(context, announce))
            watching = asyncio.create_task(
                _watch(
                    stop,
                    registry=main.registry(context, Followers(), loaded),
                    settings=main.settings(),
                    clusterwide=not settings.watch_namespaces,
                    namespaces=settings.watch_namespaces,
                    standalone=True,
                )
            )
            await _first_of(crewing, resyncing, watching, asyncio.create_task(stop.wait()))

        try:
            await _first_of(asyncio.create_task(lead(lease, work)), asyncio.create_task(stop.wait()))
        finally:
            for server in servers:
                await server.cleanup()
        log.info("stopped")


async def _first_of(*tasks: asyncio.Task[Any]) -> None:
    """Wait until one task ends, cancel the others, and raise what any of them raised."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


def _stop_on_signals(stop: asyncio.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


async def _watch(stop: asyncio.Event, **options: Any) -> None:
    """kopf until cancelled. It takes over the process' signals when it starts; we take them back."""
    ready = asyncio.Event()
    operator = asyncio.ensure_future(kopf.operator(ready_flag=ready, **options))
    started = asyncio.ensure_future(ready.wait())
    try:
        await asyncio.wait({operator, started}, return_when=asyncio.FIRST_COMPLETED)
        _stop_on_signals(stop)
        await operator
    finally:
        started.cancel()
        operator.cancel()
        await asyncio.gather(operator, started, return_exceptions=True)


async def _require_crds(kube: Kube) -> None:
    missing = {FINETUNES.kind, ADAPTERDEPLOYMENTS.kind} - await kube.kinds(f"{GROUP}/{VERSION}")
    if missing:
        raise SettingsError(
            f"the API server does not know {' and '.join(sorted(missing))} in {GROUP}/{VERSION}: "
            "apply the CustomResourceDefinitions (kubectl apply -f crds/, or the chart with crds.enabled)"
        )


async def _serve(app: web.Application, port: int, tls: ssl.SSLContext | None) -> web.AppRunner:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port, ssl_context=tls).start()
    return runner


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if not settings.reports.cert_file:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load_certificate(context, settings)
    return context


def _load_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    """Also into a context in use: a certificate that was renewed is shown to the next client."""
    try:
        context.load_cert_chain(settings.reports.cert_file, settings.reports.key_file or None)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"reports.certFile {settings.reports.cert_file} cannot be used: {error}") from error
