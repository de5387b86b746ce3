"""The processes of a run end together: what one fails of, all say, and one that goes silent ends the others.

A process that fails says why in the group's store, which lives in the first process, and leaves. The others wait for it
in a collective operation: with gloo the broken connection ends that at once, with NCCL nothing does. So in each
process threads look into the store every second, and end a process that is stuck.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from finetune_trainer.failures import PEER_LOST, RunFailure
from finetune_trainer.runspec import RENDEZVOUS_PORT
from finetune_trainer.stage import Interrupted, failure_of
from finetune_trainer.training.distributed import World, wait_for_all

log = logging.getLogger(__name__)

JOIN_SECONDS = 1200.0  # until all have started: images are pulled, nodes are found
COLLECTIVE_SECONDS = 1800.0  # longest wait for a process that is alive: the first one uploads, through outages
SILENT_SECONDS = 60.0  # a process that was not heard for this long is lost
WATCH_SECONDS = 1.0
VERDICT_SECONDS = 3.0  # a process whose connection broke waits this long for a word about why
LEAVE_SECONDS = 5.0  # the first process, with the store in it, waits this long for the others to read it
GRACE_SECONDS = 10.0  # in which the main thread ends by itself, unless it is stuck

VERDICT, LEFT = "verdict", "left"


@contextmanager
def joined(world: World, device: torch.device, end: Callable[[RunFailure], None]) -> Iterator[None]:
    """Within it this process is one of the run's; it is left by all processes together, or with the same RunFailure.

    `end` reports a failure and ends the process: for when its main thread is stuck in the driver.
    """
    if world.size == 1:
        yield
        return
    peers = Peers(world, "nccl" if device.type == "cuda" else "gloo", end)
    try:
        yield
        wait_for_all(world, device)
    except Interrupted:
        raise
    except Exception as error:
        raise peers.verdict(error) from error
    finally:
        peers.leave()


class Peers:
    """This process in touch with the others."""

    def __init__(self, world: World, backend: str, end: Callable[[RunFailure], None]) -> None:
        """Raises: RunFailure when not all processes come together in time."""
        self.world, self.backend, self.end = world, backend, end
        self._left = threading.Event()
        self._doomed: RunFailure | None = None
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", RENDEZVOUS_PORT))
        log.info("processes: %d of %d, all meet at %s:%d", world.rank + 1, world.size, address, port)
        started = time.monotonic()
        try:
            # On another thread: this one must be able to take SIGTERM while pods are waited for.
            with ThreadPoolExecutor(1) as meeting:
                self._store = meeting.submit(_meet, world, backend, address, port).result()
        except RuntimeError as error:
            raise RunFailure(
                PEER_LOST,
                f"the {world.size} processes of the run did not come together at {address}:{port} in "
                f"{time.monotonic() - started:.0f} s ({_first_line(error)}); all pods must be scheduled, and a "
                "NetworkPolicy must let them reach each other on every port",
            ) from error
        log.info("processes: all %d are there after %.1f s", world.size, time.monotonic() - started)
        self._heard = time.monotonic()
        own: TCPStore = self._store.clone()  # type: ignore[attr-defined]  # a connection is one thread's at a time
        threading.Thread(target=self._listen, args=(own,), daemon=True, name="peers").start()
        threading.Thread(target=self._guard, daemon=True, name="guard").start()

    def verdict(self, error: Exception) -> RunFailure:
        """The one failure that all processes report: the first that was told."""
        failure = None if _is_lost_connection(error) else failure_of(error)
        try:
            if failure is not None:
                return _told(self._store.compare_set(VERDICT, "", _written(failure)))
            log.warning("processes: %s", _first_line(error))
            self._store.wait([VERDICT], timedelta(seconds=VERDICT_SECONDS))
            return _told(self._store.get(VERDICT))
        except dist.DistStoreError:
            return RunFailure(PEER_LOST, f"another process of the run ended without a word ({_first_line(error)})")
        except dist.DistError:
            return failure or RunFailure(PEER_LOST, "the first process of the run ended without a word")

    def leave(self) -> None:
        """Let go of the others, who see it; the first process stays until all have read why."""
        self._left.set()
        try:
            self._store.add(LEFT, 1)
            if self.backend == "gloo":
                dist.destroy_process_group()  # ends what the others wait in
            deadline = time.monotonic() + LEAVE_SECONDS
            pause = threading.Event()
            while self.world.leads and self._store.add(LEFT, 0) < self.world.size and time.monotonic() < deadline:
                pause.wait(0.05)
        except RuntimeError as error:
            log.debug("processes: %s", error)

    def _listen(self, store: TCPStore) -> None:
        """Beat, and look for a verdict; the first process listens to the others' beats."""
        heard = {rank: (0, time.monotonic()) for rank in range(1, self.world.size)}
        while not self._left.wait(WATCH_SECONDS) and self._doomed is None:
            try:
                store.add(f"beat/{self.world.rank}", 1)
                if self.world.leads and (silent := _silent(store, heard)) is not None:
                    lost = f"process {silent + 1} of {self.world.size} was not heard for {SILENT_SECONDS:.0f} s"
                    store.compare_set(VERDICT, "", _written(RunFailure(PEER_LOST, lost)))
                if store.check([VERDICT]):
                    self._doomed = _told(store.get(VERDICT))
            except dist.DistError:
                self._doomed = RunFailure(PEER_LOST, "the first process of the run ended without a word")
            self._heard = time.monotonic()

    def _guard(self) -> None:
        """End this process on a verdict, or when the first one stops to answer (then `_listen` waits for ever)."""
        while not self._left.wait(WATCH_SECONDS):
            if self._doomed is None and time.monotonic() - self._heard > SILENT_SECONDS:
                self._doomed = RunFailure(PEER_LOST, f"the first process did not answer for {SILENT_SECONDS:.0f} s")
            if self._doomed is not None and not self._left.wait(GRACE_SECONDS):
                self.end(self._doomed)


def _meet(world: World, backend: str, address: str, port: int) -> TCPStore:
    """The store, once all processes are there and can reach each other."""
    store = TCPStore(
        "localhost" if world.leads else address, port, world.size, world.leads, timedelta(seconds=JOIN_SECONDS)
    )
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    return store


def _silent(store: TCPStore, heard: dict[int, tuple[int, float]]) -> int | None:
    """A process whose beat has not been heard for too long; `heard` keeps the newest beat of each and its time."""
    now = time.monotonic()
    for rank, (beats, _) in heard.items():
        newest = store.add(f"beat/{rank}", 0)
        if newest != beats:
            heard[rank] = newest, now
    return next((rank for rank, (_, last) in heard.items() if now - last > SILENT_SECONDS), None)


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective operation failed because of another process, not this one."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text)


def _written(failure: RunFailure) -> str:
    return json.dumps({"reason": failure.reason, "message": failure.message})


def _told(text: bytes) -> RunFailure:
    return RunFailure(**json.loads(text))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
