"""A run in Weights & Biases, by its own library: the protocol is not public.

The library takes a second to import, which happens in the tracker's thread, and starts a process (wandb-core) that
uploads. It writes below the work folder only.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune_operator.api.tracking import WandB
from finetune_trainer.page.story import Story
from finetune_trainer.results import scalars
from finetune_trainer.results.tracking import about
from finetune_trainer.results.tracking.follow import End, Lines, TrackerRefused

log = logging.getLogger(__name__)

TIMEOUT = 30.0  # of the first contact
FINISH_TIMEOUT = 8.0  # the thread is left alone soon after
REFUSED = re.compile(r"\berror (401|403|404)\b")
EXIT_CODES: dict[End, int] = {"Finished": 0, "Failed": 1, "Interrupted": 143}


class WandBRun:
    """Its id is our run id, so that every attempt goes on in the same one."""

    name: Any = "WandB"

    def __init__(self, server: WandB, folder: Path) -> None:
        self.server, self.folder, self.url = server, folder, ""
        self._run: Any = None
        self._tried = False

    def open(self, story: Story) -> int:
        """Find the run or make it; returns the newest step that it has."""
        self._require_key()
        self.folder.mkdir(parents=True, exist_ok=True)
        for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            os.environ.setdefault(variable, str(self.folder))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to the makers of the library
        import wandb

        if self._tried:
            wandb.teardown()  # what failed would keep the id to itself: "run ID is in use"
        self._tried = True
        try:
            run = wandb.init(
                project=self.server.project or about.namespace(story.run),
                entity=self.server.entity,
                id=about.run_id(story.run),
                name=about.name(story.run),
                job_type="train",
                resume="allow",
                config={**about.parameters(story.run), **about.tags(story.run)},
                allow_val_change=True,  # job and attempt are of the newest one
                settings=_settings(wandb, self.server.base_url, self.folder),
            )
        except wandb.errors.Error as error:
            known = isinstance(error, (wandb.errors.UsageError, wandb.errors.AuthenticationError))
            if known or REFUSED.search(str(error)):
                raise TrackerRefused(f"{error}; see tracking.wandb and its API key") from error
            raise
        self._run, self.url = run, run.url or ""
        return max(0, run.starting_step - 1)

    def log(self, lines: Lines) -> None:
        for line in lines:
            self._run.log(scalars.of_step(line), step=line["step"])

    def close(self, story: Story, end: End) -> None:
        run = self._run
        if story.metrics:
            run.log(scalars.of_evaluation(story.evaluation), step=story.metrics[-1]["step"])
        run.summary.update(about.outcome(story))
        if end == "Interrupted":
            run.mark_preempting()  # it will be gone on with, says this
        run.finish(exit_code=EXIT_CODES[end])

    def _require_key(self) -> None:
        """Without one the library would ask for it on the terminal."""
        if os.environ.get("WANDB_API_KEY"):
            return
        host = urlsplit(self.server.base_url).hostname or ""
        try:
            found = netrc.netrc().authenticators(host)
        except (OSError, netrc.NetrcParseError):
            found = None
        if not found:
            raise TrackerRefused(
                "there is no API key: the Secret of tracking.wandb.apiKeySecretRef is missing or has no such key; "
                "outside a cluster, set WANDB_API_KEY"
            )


def _settings(wandb: Any, base_url: str, folder: Path) -> Any:
    """Metrics and what was trained, and nothing else of the pod: no output, code, packages or machine figures."""
    return wandb.Settings(
        base_url=base_url,
        mode="online",
        root_dir=str(folder),
        reinit="create_new",  # after a failure of the library's own process
        init_timeout=TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        finish_timeout_raises=True,
        stop_fn=_stop_pressed,
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def _stop_pressed() -> None:
    """Somebody pressed stop on the run's page. The library's own answer would be SIGINT, which loses steps."""
    log.warning("tracking: WandB asks to stop the run; to stop it, set spec.suspend: true")
