"""Arguments of the trainer image and of the `finetune` command; everything heavy is imported by the command that needs
it.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

# Commands that need no cluster: the module of each.
MODULES = {"run": "local", "check-data": "check_data", "estimate": "estimate_file", "import": "importing.command"}

EXAMPLES = """\
examples:
  finetune import axolotl.yml --to finetune.yaml
  finetune check-data rows.jsonl --model path/to/base-model
  finetune estimate finetune.yaml --model path/to/base-model
  finetune run finetune.yaml --base-model path/to/base-model --data rows.jsonl --cpu
"""
RUN_EPILOG = """\
Ctrl-C saves a checkpoint; the same command goes on from it. Exit codes: 0 trained, 1 failed with the reason on stderr,
143 interrupted with a checkpoint.
"""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    root = argparse.ArgumentParser(
        prog="finetune", description="Prepare, train and export a FineTune: in its Jobs, or on this machine.",
        epilog=EXAMPLES, formatter_class=raw,
    )  # fmt: skip
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="prepare and train a FineTune on this machine, without a cluster", epilog=RUN_EPILOG,
        formatter_class=raw,
    )  # fmt: skip
    run.add_argument("file", metavar="FILE", help="a FineTune in YAML or JSON; -: standard input")
    run.add_argument(
        "--output", metavar="DIR", default="finetune-output",
        help="where adapters, checkpoints and data go, laid out like the bucket (default: finetune-output)",
    )  # fmt: skip
    run.add_argument("--base-model", metavar="DIR", help="a model's folder, instead of what baseModel names")
    run.add_argument(
        "--data", metavar="[ROLE=]PATH", action="append", default=[],
        help="rows, instead of what dataset.train names; evaluation=PATH: instead of dataset.evaluation",
    )  # fmt: skip
    run.add_argument("--cpu", action="store_true", help="train on the CPU, whatever resources.gpus says")
    data = commands.add_parser("check-data", help="what prepare would say about data files, on this machine")
    data.add_argument("data", metavar="DATA", help="a file or a folder: jsonl, json, csv or parquet, each also .gz")
    data.add_argument(
        "--model", metavar="DIR", help="a model's folder: counts tokens and shows a sample with what is learned"
    )
    data.add_argument("--finetune", metavar="FILE", help="take format, columns, length and the like from this FineTune")
    data.add_argument("--format", default="Auto", help="the rows' format, without --finetune (default: recognised)")
    data.add_argument("--objective", default="SFT", help="what is to be trained, without --finetune (default: SFT)")
    estimate = commands.add_parser("estimate", help="trainable parameters and GPU memory of a FineTune, part by part")
    estimate.add_argument("file", metavar="FILE", help="a FineTune in YAML or JSON; -: standard input")
    estimate.add_argument(
        "--model", metavar="DIR", help="the base model's folder; config.json is enough (default: asks the hub)"
    )
    other = commands.add_parser("import", help="a FineTune of an axolotl or LLaMA-Factory configuration")
    other.add_argument("file", metavar="FILE", help="their YAML; -: standard input")
    other.add_argument(
        "--to", metavar="FILE", default="-", help="where the FineTune goes (default: -, standard output)"
    )
    other.add_argument(
        "--from", dest="tool", choices=["axolotl", "llama-factory"], help="whose it is (default: seen by its settings)"
    )
    for stage, text in {
        "prepare": "in a Job: fetch and check data and base model, tokenize, estimate memory",
        "train": "in a Job: train, evaluate and upload the adapter",
        "export": "in a Job: merged, GGUF and hub exports of a trained adapter",
    }.items():
        command = commands.add_parser(stage, help=text)
        command.add_argument(
            "--spec", required=True, metavar="FILE", help="the run spec, as the operator hands it to a Job"
        )
    merge = commands.add_parser("merge", help="in a serving pod: merge an adapter into its base model", add_help=False)
    merge.add_argument("rest", nargs=argparse.REMAINDER)
    cleanup = commands.add_parser(
        "cleanup", help="in a Job: delete what a deleted FineTune alone owned", add_help=False
    )
    cleanup.add_argument("rest", nargs=argparse.REMAINDER)
    return root


def subparsers(root: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands that people run by hand, by name."""
    [commands] = (action for action in root._actions if isinstance(action, argparse._SubParsersAction))
    return {name: parser for name, parser in commands.choices.items() if name in MODULES}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed with a Result, 143 interrupted with a checkpoint)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["merge"]:  # merge has arguments of its own, none of which concern the stages
        from finetune_trainer.merge import main as merge

        return int(merge(argv[1:]) or 0)
    if argv[:1] == ["cleanup"]:  # nor have those of the clean-up
        from finetune_trainer.cleanup import main as cleanup

        return cleanup(argv[1:])
    arguments = parser().parse_args(argv)
    if arguments.command in MODULES:
        return _local(arguments)
    from finetune_trainer.stage import run_stage

    return run_stage(arguments.command, arguments.spec)


def _local(arguments: argparse.Namespace) -> int:
    """Run a command that people run by hand; a library that it lacks is asked for by name."""
    try:
        return int(import_module(f"finetune_trainer.command.{MODULES[arguments.command]}").main(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing.startswith("finetune_"):
            raise
        extras = "cli,trainer,tasks" if missing == "lm_eval" else "cli,trainer"
        print(f"{arguments.command} needs {missing} here: pip install 'finetune-operator[{extras}]'", file=sys.stderr)
        return 1
