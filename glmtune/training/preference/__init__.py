"""Preference tuning as a run: the trainer whose loss compares answers, and what it measures them against.

`trainer` changes what a step and an evaluation of `glmtune.training.trainer` compute, and nothing of how a
run is resumed, saved, watched or divided; a reader starts there. `reference` keeps log-probabilities of a
model as the run begins, and `report` sums up what was learnt.
"""
