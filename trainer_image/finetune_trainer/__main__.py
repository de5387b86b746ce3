"""`python -m finetune_trainer prepare|train|export|merge ...`: the images' entry point, and the `finetune` command."""

import sys

from finetune_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
