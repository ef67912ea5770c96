#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, tests. Works on a machine with nothing installed.
#
#   scripts/test.sh                     all of it
#   scripts/test.sh -m 'not slow' -x    arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

ruff check .
ruff format --check .
packages=(-p miles)
for folder in plugins/*/*/miles_*/; do packages+=(-p "$(basename "$folder")"); done
mypy "${packages[@]}"
OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} python -m pytest -rs "$@"
