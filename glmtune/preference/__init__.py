"""Preference tuning: learning which of two answers is better, or whether one answer is good.

`losses` holds the losses as their papers have them (DPO, IPO, ORPO, KTO), over log-probabilities that
`log_probs` makes of a batch; `rows` puts the two answers of a pair into one batch, and `figures` says what
came of it, with intervals. `settings` says what there is to choose; a reader starts there. How all of it
becomes steps of a run is in `glmtune.training.preference`.
"""
