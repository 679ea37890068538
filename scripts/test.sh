#!/usr/bin/env bash
# Install, then style with security checks, types, known vulnerabilities and tests: what CI runs. Further words go to pytest.
# The documentation is built by one of the tests (tests/contract/test_site.py), strictly, as by scripts/docs.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -n "${SKIP_SETUP:-}" ] || bash scripts/setup.sh
export PATH="${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # one test process per core; more threads only get in each other's way

ruff format --check .
ruff check .
basedpyright
python scripts/audit.py
python -m pytest --numprocesses auto --dist loadfile --durations 15 "$@"
