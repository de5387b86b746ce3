"""What the server of forks (pods.py) imports, once. Not `train`: it reads at import where its work folder is."""

import pandas  # noqa: F401  # as pyarrow does, to make an array of lists
import torch  # noqa: F401

from finetune_trainer import adapter, evaluate, fit, peers, stage, startup  # noqa: F401

startup.import_libraries(processes=2)
