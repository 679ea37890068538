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

# Types and known vulnerabilities beside the tests: they leave no core idle. What they say stands at the end.
said=$(mktemp)
(
    basedpyright
    python scripts/audit.py
) > "$said" 2>&1 &
beside=$!
trap 'kill "$beside" 2> /dev/null || true; rm -f "$said"' EXIT

# Files of tests in the order of tests/conftest.py, the slowest first, and not those with the most tests.
tests=0
python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 15 "$@" || tests=$?
checks=0
wait "$beside" || checks=$?
cat "$said"
[ "$tests" = 0 ] || echo "the tests failed (exit code $tests)" >&2
[ "$checks" = 0 ] || echo "basedpyright or the audit failed (exit code $checks)" >&2
exit $((tests ? tests : checks))
