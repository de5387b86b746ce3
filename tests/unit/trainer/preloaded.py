"""What the server of forks (pods.py) imports, once."""

import torch  # noqa: F401

from finetune_trainer import adapter, evaluate, fit, peers, stage, startup, train  # noqa: F401

startup.import_libraries()
