"""What is told of a run while it goes, besides its progress: before the first step, to trackers, at its end.

``header.py`` (start here) words what is about to be trained and what one types next; ``trackers.py`` starts
TensorBoard, W&B, MLflow and SwanLab with the run's name and settings (what they have in common with
evaluations is in ``glmtune/tracking``). Files of a run are written elsewhere:
``glmtune/training/report.py``, ``glmtune/training/log.py``.
"""
