"""`python -m finetune_operator --config settings.yaml`: the operator image's entry point."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="finetune-operator", description="Runs the operator of group finetune.dev.")
    parser.add_argument(
        "--config", type=Path, default=Path("/etc/finetune/settings.yaml"), help="settings file (default: %(default)s)"
    )
    arguments = parser.parse_args()

    from finetune_operator import logs, process
    from finetune_operator.endpoint import Place
    from finetune_operator.settings import SettingsError, load

    place = Place(
        namespace=os.environ.get("POD_NAMESPACE", "finetune-system"),
        pod=os.environ.get("POD_NAME", socket.gethostname()),
        pod_uid=os.environ.get("POD_UID", ""),
        ip=os.environ.get("POD_IP", ""),
    )
    try:
        settings = load(arguments.config)
        logs.configure(settings.log_level)
        asyncio.run(process.run(settings, place))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
