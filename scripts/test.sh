#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, tests. Works on a machine with nothing installed.
#
#   scripts/test.sh                     all of it
#   scripts/test.sh -m 'not slow' -x    arguments go to pytest
#   WORKERS=0 scripts/test.sh           one test after the other, in one process; N: in N
#
# Tests run in three processes for two cores, since some wait more than they compute, and with 4 GB of memory for each; a
# file's tests stay together.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

ruff check .
ruff format --check .
packages=(-p miles)
for folder in plugins/*/*/miles_*/; do packages+=(-p "$(basename "$folder")"); done
mypy "${packages[@]}"
workers=${WORKERS:-$(python -c "import os, psutil
print(min((os.cpu_count() or 1) * 3 // 2, max(psutil.virtual_memory().available // 2**32, 1)))")}
threads=$((workers > 1 ? 1 : 2))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder -rs "$@"
