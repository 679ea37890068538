#!/usr/bin/env bash
# From a fresh machine to a scored prefix: install, check the data, tune the embedded model, predict before and after.
# On Windows: pip install -e . and then python -m glmtune quickstart, which this ends with.
# Further words are Hydra overrides of the training: bash scripts/quickstart.sh trainer.max_steps=100
set -euo pipefail
cd "$(dirname "$0")/.."

[ -n "${SKIP_SETUP:-}" ] || bash scripts/setup.sh
export PATH="${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH"
RUN=${RUN:-runs/quickstart}

glmtune quickstart output_dir="$RUN" "$@"
