"""The export stage: what spec.output asks for, made from the trained adapter and verified before it is said to exist.

    python -m finetune_trainer export --spec spec.json

What is in the bucket already, whole, is not made again; so an attempt goes on where the one before has failed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from finetune_operator.api.finetunestatus import AdapterStatus, ExportStatus
from finetune_trainer.digest import MANIFEST, hash_tree, hex_of, short, tree_digest
from finetune_trainer.interruption import Sigterm
from finetune_trainer.mergespec import MergeResult, MergeSpec
from finetune_trainer.report import Reporter
from finetune_trainer.results.hubpush import push
from finetune_trainer.results.modelcard import CARD, gguf_card, merged_card
from finetune_trainer.runspec import ExportResult, Result, RunSpec
from finetune_trainer.sources import basemodel
from finetune_trainer.storage.connection import ObjectNotFound
from finetune_trainer.storage.store import Store

log = logging.getLogger(__name__)

WORK = Path(os.environ.get("FINETUNE_WORK", "/work"))
TOKEN = "FINETUNE_OUTPUT_HF_TOKEN"
Precision = Literal["BF16", "FP16", "FP32"]
PRECISIONS: dict[str, Precision] = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}


def main(run: RunSpec) -> Result:
    """Make every export; RunFailure says which one cannot be made and why."""
    if run.prepared is None or run.trained is None:
        raise ValueError("an export Job needs the results of prepare and train in its run spec")
    Sigterm()  # ends the process at once: nothing is lost
    store, work = Store(run.storage, told=Reporter(run).waits), WORK / "export"
    shutil.rmtree(work, ignore_errors=True)
    made = export(run, store, work)
    return Result(stage="export", job=run.job, run_id=run.prepared.run_id, exported=ExportResult(exports=made))


def export(run: RunSpec, store: Store, work: Path) -> list[ExportStatus]:
    """One entry per export, in the order of spec.output."""
    assert run.trained
    made = models(run, store, work)
    if run.spec.output.hub is None:
        return list(made.values())
    source = made["Merged"] if run.spec.output.hub.content == "Merged" else run.trained.adapter
    return [*made.values(), pushed(run, store, source, work / "hub")]


def models(run: RunSpec, store: Store, work: Path) -> dict[str, ExportStatus]:
    """What spec.output.exports asks for; all of it is made from one merge."""
    merged = cache(lambda: merge_once(run, store, work / "merged"))
    makers = {"Merged": merged_model, "GGUF": gguf_model}
    return {kind: makers[kind](run, store, merged) for kind in run.spec.output.exports}


class Merged(NamedTuple):
    """Base model and adapter as one plain model on this machine, its logits compared with the mounted adapter's."""

    folder: Path
    result: MergeResult


def merge_once(run: RunSpec, store: Store, folder: Path) -> Merged:
    assert run.trained and run.prepared
    from finetune_trainer import merge

    base, adapter = run.prepared.base_model, run.trained.adapter
    spec = MergeSpec(
        name=run.name,
        storage=run.storage,
        base_uri=base.uri,
        base_digest=base.digest,
        adapter_uri=adapter.uri,
        adapter_digest=adapter.digest,
        precision=merged_precision(run, store),
        # What an adapter is worth was judged when it was trained; here it is the arithmetic that is checked.
        min_logprob_delta=0,
        exported=True,
        trust_remote_code=run.spec.base_model.trust_remote_code,
    )
    result = merge.merge(spec, folder, store)
    (folder / merge.RECORD).unlink()  # of this machine's arithmetic, to the last digit: it is in the manifest
    return Merged(folder, result)


# ---- merged ----------------------------------------------------------------------------------------------------------


def merged_model(run: RunSpec, store: Store, merge: Callable[[], Merged]) -> ExportStatus:
    """Base model and adapter as one plain model at `merged/<digest>/`."""
    if done := _whole(run, store, "merged"):
        return done
    assert run.prepared
    folder, result = merge()
    (folder / CARD).write_text(
        merged_card(run, result.dtype, basemodel.license_of(store, run.prepared.base_model.digest))
    )
    return _uploaded(run, store, "Merged", folder, verification(result), lineage(run, "Merged", result))


def _whole(run: RunSpec, store: Store, place: str) -> ExportStatus | None:
    """What an earlier attempt, or another run with the same adapter, has left at `place`, if it is still whole."""
    found = store.get_json(_known(run, store, place))
    if found is None:
        return None
    status = ExportStatus.model_validate(found)
    try:
        whole = store.verify_tree(f"{place}/{hex_of(status.digest)}")
    except ObjectNotFound:
        return None
    if whole:
        log.info("%s: is at %s already", place, status.uri)
    return status if whole else None


def _known(run: RunSpec, store: Store, place: str) -> str:
    assert run.trained
    return f"{place}/known/{hex_of(run.trained.adapter.digest)}-{merged_precision(run, store)}.json"


def _uploaded(
    run: RunSpec, store: Store, kind: Literal["Merged", "GGUF"], folder: Path, message: str, manifest: dict[str, Any]
) -> ExportStatus:
    """A folder at `<kind>/<digest>/`, and a note by which it is found again."""
    files, place = hash_tree(folder), kind.lower()
    digest = tree_digest(files)
    prefix = f"{place}/{hex_of(digest)}"
    status = ExportStatus(
        type=kind, uri=store.uri(prefix), digest=digest, size_bytes=sum(file.size for file in files), message=message
    )
    if store.verify_tree(prefix) is None:
        store.upload_tree(folder, prefix, manifest, files)
    store.put_json(_known(run, store, place), status.model_dump(mode="json", by_alias=True))
    log.info("%s: %s, %.1f MB, %s", place, short(digest), status.size_bytes / 1e6, status.uri)
    return status


def merged_precision(run: RunSpec, store: Store) -> Precision:
    """output.mergedPrecision; Auto is the type of the base model's weights."""
    asked = run.spec.output.merged_precision
    if asked != "Auto":
        return asked
    assert run.prepared
    config = _base_config(store, run.prepared.base_model.uri)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return PRECISIONS.get(str(dtype), "BF16")


def _base_config(store: Store, uri: str) -> dict[str, Any]:
    if uri.startswith("file://"):
        config: dict[str, Any] = json.loads((Path(uri.removeprefix("file://")) / "config.json").read_bytes())
    else:
        config = store.at(uri).get_json("config.json") or {}
    inner: dict[str, Any] = config.get("text_config") or {}
    return {**inner, **config}


def verification(result: MergeResult) -> str:
    """How the merged model was compared, for status and card."""
    return (
        f"its {result.compared} differ from the mounted adapter's by {result.logit_difference:.2g} standard deviations "
        f"(at most {result.tolerance:.2g} in {result.dtype})"
    )


def lineage(run: RunSpec, kind: str, result: MergeResult, **more: Any) -> dict[str, Any]:
    """What the manifest says beside the files."""
    assert run.prepared and run.trained
    base, adapter = run.prepared.base_model, run.trained.adapter
    return {
        "kind": kind,
        "runId": run.prepared.run_id,
        "adapter": {"digest": adapter.digest, "uri": adapter.uri},
        "baseModel": {"digest": base.digest, "revision": base.revision, "uri": base.uri},
        "verification": {**result.model_dump(mode="json", by_alias=True, exclude_none=True), **more},
    }


# ---- gguf ------------------------------------------------------------------------------------------------------------


def gguf_model(run: RunSpec, store: Store, merge: Callable[[], Merged]) -> ExportStatus:
    """The merged model as one file for llama.cpp at `gguf/<digest>/`, compared with it by llama.cpp itself."""
    if done := _whole(run, store, "gguf"):
        return done
    from finetune_trainer.results.gguffile.make import make

    assert run.prepared
    source, result = merge()
    folder = source.with_name("gguf")
    made = make(source, result.dtype, run.name, folder, run.spec.base_model.trust_remote_code)
    license = basemodel.license_of(store, run.prepared.base_model.digest)
    (folder / CARD).write_text(gguf_card(run, made.file.name, result.dtype, license))
    agreement = {
        "ggufLogitDifference": float(f"{made.agreement.logits:.4g}"),
        "ggufTolerance": made.agreement.tolerance,
    }
    message = (
        f"in llama.cpp its logits differ from the merged model's by {made.agreement.logits:.2g} standard deviations (at "
        f"most {made.agreement.tolerance:.2g} in {result.dtype}), the merged model's from the mounted adapter's by "
        f"{result.logit_difference:.2g}; {made.agreement.texts} texts have the same tokens"
        + ("" if made.agreement.marks else ", but llama.cpp splits words with combining marks (Hindi, Thai) otherwise")
        + ("" if made.agreement.chat else "; llama.cpp writes a conversation otherwise by its chat template")
    )
    return _uploaded(run, store, "GGUF", folder, message, lineage(run, "GGUF", result, **agreement))


# ---- hub -------------------------------------------------------------------------------------------------------------


def pushed(run: RunSpec, store: Store, source: AdapterStatus | ExportStatus, folder: Path) -> ExportStatus:
    """The adapter or the merged model in the hub's repository, manifest included, so that the digest holds there too."""
    hub = run.spec.output.hub
    assert hub and run.prepared
    manifest = store.at(source.uri).download_tree("", folder, source.digest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False), encoding="utf-8")
    message = f"{run.namespace}/{run.name}: run {run.prepared.run_id}, {source.digest}"
    commit = push(hub.repo, folder, source.digest, hub.private, os.environ.get(TOKEN, ""), message)
    return ExportStatus(
        type="Hub",
        uri=f"hf://{hub.repo}@{commit}",
        digest=source.digest,
        size_bytes=source.size_bytes,
        message=f"every file of {hub.repo} was compared with the bucket's",
    )
