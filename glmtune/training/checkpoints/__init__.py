"""Checkpoints of a run: what is in such a folder (`folder`), and how it is written while training (`saving`).

A checkpoint is complete or not there. The formats of weights are elsewhere: those of models in
`glmtune.models.checkpoints`, those that ZeRO has split in `glmtune.training.distributed.zero_state`.
"""
