"""Trackers of experiments: TensorBoard, W&B, MLflow, SwanLab.

``services.py`` (start here) checks that they can be used and names runs; ``scores.py`` sends the figures of
an evaluation. Training sends its own through transformers' callbacks: ``glmtune/training/tracking``.
"""
