#!/usr/bin/env bash
# Make the embedded model again, from nothing: tokenizer and config, 8,000 steps of training, packaging, exam.
# The training took 61 minutes on one core of a machine full of other jobs, 57 at the median pace. FOLDER is where the model is put (default: build/glm-tiny, not the package's own).
set -euo pipefail
FOLDER="${1:-build/glm-tiny}"
RUN="${2:-runs/pretrain_tiny}"
python -m glmtune.tiny.start "$FOLDER"
glmtune train +recipe=pretrain_tiny model.source="$FOLDER" output_dir="$RUN"
python -m glmtune.tiny.package "$RUN/last" "$FOLDER"
python scripts/exam_tiny.py "$FOLDER" 200
