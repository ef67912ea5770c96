#!/usr/bin/env bash
# Make .venv with everything of this repository in it. Source it (`. scripts/setup.sh`) to have the venv active after.
# Idempotent: a stamp of what went in makes a second run a matter of milliseconds.
#
#   PYTHON=python3.12 scripts/setup.sh      another interpreter (3.11 or newer)
#   VENV=/somewhere scripts/setup.sh        another place

MILES_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MILES_VENV=${VENV:-$MILES_ROOT/.venv}

miles_setup() (
  set -euo pipefail
  cd "$MILES_ROOT"
  for python in ${PYTHON:-python3 python3.12 python3.11} ""; do
    "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break
  done
  [[ $python ]] || { echo "miles needs Python 3.11 or newer with venv. Where is one? PYTHON=/path/to/python3.12" >&2; exit 1; }
  stamp=$(cat constraints.txt requirements-dev.txt pyproject.toml plugins/*/*/pyproject.toml scripts/setup.sh | cksum)
  [[ -f $MILES_VENV/.stamp && $(<"$MILES_VENV/.stamp") == "$stamp" ]] && exit 0

  echo "setting up $MILES_VENV"
  [[ -x $MILES_VENV/bin/python ]] || "$python" -m venv "$MILES_VENV"
  pip() { "$MILES_VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
  miles_torch
  packages=(-e .)
  for plugin in plugins/*/*/; do packages+=(-e "$plugin"); done
  pip install --quiet --constraint constraints.txt "${packages[@]}" --requirement requirements-dev.txt
  echo "$stamp" >"$MILES_VENV/.stamp"
)

# torch first: whatever is installed later is content with it. Without a GPU on Linux, its CPU build, which is 20 times
# smaller: from wherever pip is set up to look, or else from PyTorch's own index.
miles_torch() {
  torch=$(grep '^torch==' constraints.txt)
  if [[ $(uname -s) == Linux ]] && ! nvidia-smi >/dev/null 2>&1; then
    pip install --quiet "$torch+cpu" 2>/dev/null && return
    pip install --quiet "$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu && return
  fi
  pip install --quiet "$torch"
}

miles_setup && . "$MILES_VENV/bin/activate"
