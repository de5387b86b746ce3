"""Arguments of the trainer image and of the `finetune` command; everything heavy is imported by the command that needs
it.
"""

from __future__ import annotations

import argparse
import sys


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="finetune", description="Prepare, train and export a FineTune: in its Jobs, or on this machine."
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage, text in {
        "prepare": "fetch and check data and base model, tokenize, estimate memory (CPU)",
        "train": "train, evaluate and upload the adapter",
        "export": "merged, GGUF and hub exports of a trained adapter",
    }.items():
        command = commands.add_parser(stage, help=text)
        command.add_argument(
            "--spec", required=True, metavar="FILE", help="the run spec, as the operator hands it to a Job"
        )
    merge = commands.add_parser("merge", help="merge an adapter into its base model, for serving", add_help=False)
    merge.add_argument("rest", nargs=argparse.REMAINDER)
    return root


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed with a Result, 143 interrupted with a checkpoint)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["merge"]:  # merge has arguments of its own, none of which concern the stages
        from finetune_trainer.merge import main as merge

        return int(merge(argv[1:]) or 0)
    arguments = parser().parse_args(argv)
    from finetune_trainer.stage import run_stage

    return run_stage(arguments.command, arguments.spec)
