#!/usr/bin/env bash
# Data, warm-up, reinforcement learning with a Python interpreter. Run again, it goes on where it stopped.
#
#   examples/retool/run.sh [FLAG ...]        writes runs/retool; flags go to the reinforcement learning
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$here/../../runs/retool"
cd "$here/../../runs/retool"

[[ -d data ]] || { rm -rf data.part; python "$here/make_data.py" --out data.part; mv data.part data; }
echo "--- warm-up: imitating a pupil who mostly guesses"
miles train "$here/sft.yaml"
echo "--- reinforcement learning: an interpreter, and whether answers are right"
miles train "$here/config.yaml" "$@"
