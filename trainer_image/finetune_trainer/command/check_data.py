"""`finetune check-data`: what prepare would say about data files, on this machine and in seconds."""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.command.finetunefile import BadFile, read_finetune
from finetune_trainer.data.check import Problems, read_samples
from finetune_trainer.data.rows import DataFile
from finetune_trainer.failures import RunFailure
from finetune_trainer.sources.datafiles import files_at


def main(arguments: argparse.Namespace) -> int:
    """Print what is in the data; 1 when it could not be trained on."""
    try:
        spec = _spec(arguments)
        files = _files(Path(arguments.data))
        if arguments.model:
            _with_tokens(files, spec, Path(arguments.model))
        else:
            _without_tokens(files, spec)
    except (RunFailure, BadFile) as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def _spec(arguments: argparse.Namespace) -> FineTuneSpec:
    if arguments.finetune:
        return read_finetune(Path(arguments.finetune)).spec
    source = {"s3": {"uri": "s3://local/data"}}
    spec = {
        "baseModel": source,
        "dataset": {"train": source, "format": arguments.format},
        "objective": {"type": arguments.objective},
    }
    try:
        return FineTuneSpec.model_validate(spec)
    except ValidationError as error:
        option = "--format" if error.errors()[0]["loc"][0] == "dataset" else "--objective"
        raise BadFile(f"{option}: {error.errors()[0]['msg']}") from error


def _files(path: Path) -> list[DataFile]:
    if not path.exists():
        raise BadFile(f"{path} does not exist")
    if not (found := files_at(path)):
        raise BadFile(f"{path}: there are no files in this folder")
    return found


def _without_tokens(files: list[DataFile], spec: FineTuneSpec) -> None:
    problems = Problems()
    reading = read_samples(files, spec.dataset, spec.objective.type, problems)
    good = sum(1 for _ in islice(reading.samples, spec.dataset.max_samples))
    print(f"format   {reading.form.name}\nsamples  {good}\ninvalid  {problems.count}")
    if problems.count and spec.dataset.on_invalid_row == "Skip":
        print("\n".join(problems.first))
    else:
        problems.fail(good + problems.count)
    print("name a base model's folder with --model to count tokens and see a sample as it is learned")


def _with_tokens(files: list[DataFile], spec: FineTuneSpec, model: Path) -> None:
    from finetune_trainer.data.build import build_dataset
    from finetune_trainer.data.tokenizer import load_tokenizer

    if not (model / "config.json").is_file():
        raise BadFile(f"{model} has no config.json: name a model's folder with its config and tokenizer")
    with tempfile.TemporaryDirectory() as work:
        built = build_dataset(spec, files, None, load_tokenizer(model), model, Path(work))
    about, status = built.about, built.status
    lengths = ", ".join(f"{name} {value}" for name, value in about["lengths"].items())
    print(
        f"format      {status.format}\nsamples     {status.samples} ({status.evaluation_samples} held out)\n"
        f"invalid     {status.skipped}\nduplicates  {status.duplicates}\ntruncated   {status.truncated}\n"
        f"dropped     {status.dropped}\ntokens      {status.tokens} ({about['learnedTokens']} learned)\n"
        f"lengths     {lengths}\nrows        {built.rows} of up to {about['maxLength']} tokens"
        f"{' (packed)' if about['packing'] else ''}\n\nthe first sample; >> is learned:"
    )
    for piece in built.preview:
        mark = ">> " if piece["learned"] else "   "
        print("\n".join(mark + line for line in piece["text"].splitlines()))
