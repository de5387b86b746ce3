"""The trainer: what runs inside a FineTune's Jobs (prepare, train, export) and the `finetune` command.

Each module starts with what it is for. Where to look:

contract     runspec, mergespec, failures, digest
stages       stage, launch, prepare, train, export, merge, interruption, inputs, outcome, report, progress
files        store, connection, folder, fetch, sources, hub, hubpush, datafiles, basemodel, modelfiles, servedbase
data         rows, formats, check, chat, tokenizer, collect, spool, pack, build, prepared, data, schedule
memory       architecture, trainable, estimate, verdict, plan, device, precision, quantization, shards
methods      methods, initialization, combinations, suitability, plainlora, servable, dropout, optimizers
objectives   objectives, loss, answers, pairs, dpo, kto, orpo, reward, reference
training     fit, layout, attention, checkpoint, distributed, peers, startup, eager
results      evaluate, gates, adapter, modelcard, probeprompts, tasks, gguffile, scalars, eventfile, tracking
report.html  story, page, pagestyle, svg
command      cli, local, terminal, finetunefile, apirules, estimate_file, check_data, importing
"""
