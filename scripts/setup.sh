#!/usr/bin/env bash
# Make .venv (or use the virtual environment that is active) and install glmtune with its test tools.
# Running it again only brings it up to date.
#   PYTHON=python3.12   which Python makes the environment (3.11 or newer)
#   TORCH="torch"       which build of PyTorch to install; default: the version the tests ran with.
#                       An environment that already has PyTorch keeps its own build.
#   LOCKED=1            the versions of requirements-ci.lock, with which the tests passed
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "glmtune needs Python 3.11 or newer, but $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON=..." >&2
    exit 1
}
VENV=${VIRTUAL_ENV:-.venv}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
# The build of PyTorch depends on the machine, so it is installed first and the project never pins it.
"$VENV/bin/python" -c 'import torch' 2>/dev/null || "$VENV/bin/python" -m pip install --quiet "$TORCH"
if [ -n "${LOCKED:-}" ]; then
    "$VENV/bin/python" -m pip install --quiet --requirement requirements-ci.lock
fi
"$VENV/bin/python" -m pip install --quiet --editable '.[dev,docs,deepspeed,web]'
echo "glmtune is installed: source $VENV/bin/activate, then glmtune --help"
