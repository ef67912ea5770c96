#!/usr/bin/env bash
# A virtual environment of its own for a peer that miles is compared with. CPU builds; run again, it does nothing.
#
#   scripts/peers/install.sh trl        makes .peers/trl
set -euo pipefail
cd "$(dirname "$0")/../.."
case ${1:-} in
  trl) packages=(torch==2.13.0 trl==1.16.0) ;;
  *) echo "usage: $0 trl" >&2; exit 2 ;;
esac
venv=.peers/$1
[[ -f $venv/installed ]] && exit 0
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet "${packages[0]}"      # torch first: what follows must not bring the CUDA build
"$venv/bin/pip" install --quiet "${packages[@]}"
"$venv/bin/pip" freeze > "$venv/installed"
