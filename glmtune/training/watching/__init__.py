"""Looking for trouble while a run trains: rules over its steps, and what follows a loss that is not finite.

`callback` gathers the numbers of a step and asks `rules`, which report without stopping; `evidence` makes the
error that does stop, and `rollback_log` keeps the record of going back. Going back itself drives the trainer,
so it stands above, in `glmtune.training.rollback`. A reader starts with `rules`.
"""
