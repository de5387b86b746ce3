"""`finetune estimate`: trained parameters and memory of a FineTune file, part by part, from the model's config.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.command.finetunefile import BadFile, read_finetune
from finetune_trainer.failures import RunFailure
from finetune_trainer.memory.architecture import Architecture, architecture, read_config
from finetune_trainer.memory.estimate import GIB, Estimate, Workload, estimate, gib, longest_row
from finetune_trainer.memory.verdict import verdict
from finetune_trainer.methods.combinations import refusals
from finetune_trainer.methods.experts import adapts_experts
from finetune_trainer.methods.suitability import refuse_unsuitable
from finetune_trainer.sources import hub

WORDS = {"Fits": "fits ", "DoesNotFit": "does not fit: ", "Unknown": "unknown whether it fits: "}


def main(arguments: argparse.Namespace) -> int:
    """Print the estimate; 1 when the run is known not to fit or cannot be trained."""
    try:
        spec = read_finetune(Path(arguments.file)).spec
        model = Path(arguments.model) if arguments.model else _config_of(spec)
        return _print(spec, model)
    except (RunFailure, BadFile) as failure:
        print(failure, file=sys.stderr)
        return 1


def _config_of(spec: FineTuneSpec) -> Path:
    """A folder with the config.json of a hub model."""
    source = spec.base_model.hugging_face
    if source is None:
        raise BadFile("name the base model's folder with --model DIR; config.json in it is enough")
    from huggingface_hub import hf_hub_download

    with hub.explained("base model", source.repo, source.revision, None):
        return Path(hf_hub_download(source.repo, "config.json", revision=source.revision)).parent


def _print(spec: FineTuneSpec, model: Path) -> int:
    if not (model / "config.json").is_file():
        raise BadFile(f"--model {model}: there is no config.json in it; name a model's folder")
    config = read_config(model)
    shape = architecture(config)
    if shape is None:
        named = config.get("model_type")
        raise BadFile(
            f"model_type {named!r} of {model}/config.json is not known to the estimate; it can be trained where transformers "
            "and PEFT know it"
            if named
            else f"{model}/config.json names no model_type: it is not a model's config.json"
        )
    if refused := list(refusals(spec)):
        raise BadFile("\n".join(refused))
    refuse_unsuitable(shape, spec, config)
    if adapts_experts(spec, config):
        raise BadFile("no estimate for a run that adapts experts; name the layers beside them in targetModules")
    found = verdict(shape, Workload(spec, longest_row(spec)))
    work = Workload(spec, longest_row(spec), shards=found.shards or 1)
    asked = spec.training.micro_batch_size
    size = int(asked) if asked != "auto" and found.verdict != "DoesNotFit" else found.largest_micro_batch or 1
    print(table(shape, estimate(shape, work, size, bool(found.gradient_checkpointing))))
    print(f"\n{WORDS[found.verdict]}{found.message}")
    return 1 if found.verdict == "DoesNotFit" else 0


def table(shape: Architecture, found: Estimate) -> str:
    """The estimate as people read it."""
    checkpointing = "with" if found.checkpointing else "without"
    share = 100 * found.trainable / shape.parameters
    rows = [(part.name, gib(part.low), gib(part.expected), gib(part.high), part.source) for part in found.parts]
    total = ("total", f"{found.low / GIB:.1f}Gi", gib(found.expected), gib(found.high), "")
    lines = [
        f"{name:<24}{low:>8}{expected:>10}{high:>8}  {source}".rstrip()
        for name, low, expected, high, source in (*rows, total)
    ]
    return "\n".join(
        [
            f"parameters          {shape.parameters:>15,}",
            f"trained             {found.trainable:>15,}  ({share:.2f} %)",
            f"micro batch         {found.micro_batch:>15,}  ({checkpointing} gradient checkpointing)",
            "",
            f"{'memory of one GPU':<24}{'low':>8}{'expected':>10}{'high':>8}  source",
            *lines,
        ]
    )
