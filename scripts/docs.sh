#!/usr/bin/env bash
# Build the documentation into site/ (English, and Chinese under zh/): a broken link or a page that no link leads to ends it.
#   bash scripts/docs.sh            build
#   bash scripts/docs.sh --serve    build, then show it at http://127.0.0.1:8080 (PORT=...), without a network
#   SITE=FOLDER                     where it is written; default: site
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH" NO_MKDOCS_2_WARNING=1
SITE=${SITE:-site}
python -c 'import mkdocs' 2>/dev/null || {
    echo "The documentation needs MkDocs: pip install -e '.[docs]'" >&2
    exit 1
}
python -m mkdocs build --strict --clean --site-dir "$SITE"
if [ "${1:-}" = --serve ]; then
    exec python -m http.server "${PORT:-8080}" --bind 127.0.0.1 --directory "$SITE"
fi
