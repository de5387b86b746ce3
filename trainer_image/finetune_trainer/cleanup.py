"""The clean-up step, `python -m finetune_trainer cleanup --spec spec.json`: deletes the folders of a deleted FineTune.

Deleting what is gone already is no failure, so a second try goes on where the first was interrupted.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune_trainer import failures
from finetune_trainer.cleanupspec import DELETABLE, CleanupResult, CleanupSpec
from finetune_trainer.failures import RunFailure
from finetune_trainer.runspec import Failure
from finetune_trainer.stage import DONE, FAILED, failure_of, termination_log
from finetune_trainer.storage.connection import ObjectNotFound
from finetune_trainer.storage.store import Store

log = logging.getLogger(__name__)

#: The Job has a deadline and is tried again; waiting longer for a store would only hide the reason.
WAIT_SECONDS = 60.0


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 when nothing of the folders is left."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s")
    parser = argparse.ArgumentParser(prog="finetune cleanup")
    parser.add_argument(
        "--spec", required=True, metavar="FILE", help="the clean-up spec, as the operator hands it over"
    )
    result = cleanup(CleanupSpec.model_validate_json(Path(parser.parse_args(argv).spec).read_bytes()))
    termination_log().write_text(result.model_dump_json(by_alias=True, exclude_none=True), encoding="utf-8")
    return FAILED if result.failure else DONE


def cleanup(spec: CleanupSpec) -> CleanupResult:
    """Delete every folder, and nothing if one of them is not what a FineTune writes."""
    deleted = 0
    try:
        for uri in spec.uris:
            if not re.match(DELETABLE, uri):
                raise RunFailure(failures.INTERNAL_ERROR, f"{uri} is no run, adapter or export: nothing is deleted")
        store = Store(spec.storage, wait_seconds=WAIT_SECONDS)
        for uri in spec.uris:
            deleted += delete(store.at(uri))
    except Exception as error:  # noqa: BLE001  # becomes the result, whatever it is
        known = failure_of(error)
        log.error("%s: %s", known.reason, known.message)
        return CleanupResult(objects=deleted, failure=Failure(reason=known.reason, message=known.message[:2000]))
    return CleanupResult(objects=deleted)


def delete(folder: Store) -> int:
    """How many objects there were; none in a bucket that is gone."""
    try:
        found = folder.delete("")
    except ObjectNotFound:
        found = 0
    log.info("%s: %d objects deleted", folder.uri(), found)
    return found
