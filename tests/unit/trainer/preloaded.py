"""What the server of forks (pods.py) imports, once. Not `train`: it reads at import where its work folder is."""

import pandas  # noqa: F401  # as pyarrow does, to make an array of lists
import torch  # noqa: F401

from finetune_trainer import stage  # noqa: F401
from finetune_trainer.evaluation import evaluate  # noqa: F401
from finetune_trainer.results import adapter  # noqa: F401
from finetune_trainer.training import (
    fit,  # noqa: F401
    peers,  # noqa: F401
    startup,
)

startup.import_libraries(processes=2)
