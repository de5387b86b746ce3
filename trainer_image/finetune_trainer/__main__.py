"""`python -m finetune_trainer prepare|train|export|merge ...`: the images' entry point, and the `finetune` command."""

import os
import sys

from finetune_trainer.command.cli import main

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an ordinary exit would wait for downloads in other threads, minutes after a stage has failed
