"""Training: `transformers.Trainer` with exact resuming, atomic checkpoints and several processes.

A run passes `recipes/train.py` (the whole course on one screen), then `session` (begin, train, report),
`adapt` (what is trained), `arguments` (our settings as `TrainingArguments`) and `trainer` (what is changed in
transformers' trainer); a reader starts with `session`. The sub-packages hold what `trainer` stands on:
`distributed`, `checkpoints`, `watching`, and `starting` (how a run begins, or goes on with other settings).
Models, data and prefixes are packages of their own.
"""
