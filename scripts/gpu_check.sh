#!/usr/bin/env bash
# What only a GPU can tell: the tests marked `gpu`, and the figures of generation, tuning and the engine at the shape of
# ChatGLM2-6B, in under eight minutes and without network, into benchmarks/results/gpu/CARD.md.
#   bash scripts/gpu_check.sh                   on a machine with a CUDA card
#   bash scripts/gpu_check.sh --dry-run         all of it at tiny sizes on the CPU
#   bash scripts/gpu_check.sh --only PART ...   some parts; --list names them
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VIRTUAL_ENV:-.venv}
PYTHON=python3
[ ! -x "$VENV/bin/python" ] || PYTHON=$VENV/bin/python

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}  # one card, however many there are
exec "$PYTHON" -m benchmarks.gpu.check "$@"
