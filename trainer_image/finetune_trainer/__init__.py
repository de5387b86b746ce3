"""The trainer: what runs inside a FineTune's Jobs (prepare, train, export) and the `finetune` command."""
