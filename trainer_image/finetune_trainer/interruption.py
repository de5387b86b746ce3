"""SIGTERM: before and after training there is nothing to save, so the process ends at once; during training it is noted."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune_trainer.stage import INTERRUPTED

log = logging.getLogger(__name__)


class Sigterm:
    """Handles SIGTERM from its creation on; `received` says whether it came while it was deferred."""

    def __init__(self) -> None:
        self.received = False
        self._deferred = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it SIGTERM only sets `received`: the loop saves a checkpoint after its step and ends."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        if self._deferred:
            log.info("SIGTERM: a checkpoint is saved after this step")
            return
        log.info("SIGTERM: nothing is lost, the next attempt goes on from the newest checkpoint")
        logging.shutdown()
        os._exit(INTERRUPTED)  # an ordinary exit would wait for downloads in other threads
