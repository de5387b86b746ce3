"""The trainer: what runs inside a FineTune's Jobs (prepare, train, export) and the `finetune` command.

Each module and package starts with what it is for. Where to look:

contract    runspec, mergespec, cleanupspec, failures, digest
stages      prepare, train, export, merge, cleanup
a stage     stage, launch, inputs, interruption, report, progress
storage     the bucket, or a folder in place of one
sources     where base models and datasets come from
data        rows, formats, chat templates, tokens, packing, batches
memory      what a run needs of a GPU, and the verdict
methods     from `method` to an adapter; what cannot be combined
objectives  SFT, DPO, KTO, ORPO, Reward
training    the loop, checkpoints, precision, quantization, several processes
evaluation  base against adapter, gates, tasks
results     the adapter, its model card, GGUF, hub, trackers
page        report.html
command     `finetune run | estimate | check-data | import`
"""
