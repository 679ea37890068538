"""Several processes, on one machine or many: starting them, talking between them, and sharding a model.

`launch` (and `hosts`, over ssh) starts the processes, `parent` ends them with whoever started them;
`collectives` is how they talk; `deepspeed_settings`, `deepspeed_engine`, `fsdp` and `sharded_loading` split a
model among them, and `zero_state` writes and reads what ZeRO has split. How rows are shared is not here, but
in `glmtune.training.rank_batches`. A reader starts with `start`, then `launch`, then `collectives`.
"""
