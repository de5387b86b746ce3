module finetune.dev/pause

go 1.25.0
