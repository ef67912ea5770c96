#!/usr/bin/env bash
# Make .venv with everything of this repository in it. Source it (`. scripts/setup.sh`) to have the venv active after.
# Idempotent: a stamp of what went in makes a second run a matter of milliseconds.
#
#   PYTHON=python3.12 scripts/setup.sh      another interpreter (3.11 or newer)
#   VENV=/somewhere scripts/setup.sh        another place

MILES_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MILES_VENV=${VENV:-$MILES_ROOT/.venv}

miles_setup() (
  set -uo pipefail # -e would do nothing in what is called before &&, as this is
  cd "$MILES_ROOT" || exit 1
  for python in ${PYTHON:-python3 python3.12 python3.11} ""; do
    "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break
  done
  [[ $python ]] || { echo "miles needs Python 3.11 or newer with venv. Where is one? PYTHON=/path/to/python3.12" >&2; exit 1; }
  stamp=$(cat constraints.txt requirements-dev.txt pyproject.toml plugins/*/*/pyproject.toml scripts/setup.sh | cksum)
  [[ -f $MILES_VENV/.stamp && $(<"$MILES_VENV/.stamp") == "$stamp" ]] && exit 0

  size="about 0.4 GB"
  miles_without_gpu || size="several GB, with CUDA"
  echo "setting up $MILES_VENV: downloads $size, and takes a minute or more"
  [[ -x $MILES_VENV/bin/python ]] || "$python" -m venv "$MILES_VENV" || exit 1
  complaints=$(mktemp)
  trap 'rm -f "$complaints"' EXIT
  miles_torch || exit 1
  packages=(-e .)
  for plugin in plugins/*/*/; do packages+=(-e "$plugin"); done
  miles_pip --constraint constraints.txt "${packages[@]}" --requirement requirements-dev.txt || exit 1
  echo "$stamp" >"$MILES_VENV/.stamp"
)

# pip install. What pip says on stderr matters only when it fails: it warns of much that is no trouble here.
miles_pip() {
  "$MILES_VENV/bin/python" -m pip --disable-pip-version-check install --quiet "$@" 2>"$complaints" && return
  local code=$?
  cat "$complaints" >&2
  return "$code"
}

miles_without_gpu() { [[ $(uname -s) == Linux ]] && ! nvidia-smi >/dev/null 2>&1; }

# torch first: whatever is installed later is content with it. Without a GPU on Linux, its CPU build, which is far
# smaller: from wherever pip is set up to look, or else from PyTorch's own index.
miles_torch() {
  torch=$(grep '^torch==' constraints.txt)
  if miles_without_gpu; then
    miles_pip "$torch+cpu" 2>/dev/null && return
    miles_pip "$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu && return
  fi
  miles_pip "$torch"
}

miles_setup && . "$MILES_VENV/bin/activate"
