#!/usr/bin/env bash
# Data, warm-up, reinforcement learning of the agent. Run again, it goes on where it stopped.
#
#   examples/strands-agents/run.sh [FLAG ...]        writes runs/strands-agents; flags go to the reinforcement learning
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$here/../../runs/strands-agents"
cd "$here/../../runs/strands-agents"

[[ -d data ]] || { rm -rf data.part; python "$here/make_data.py" --out data.part; mv data.part data; }
echo "--- warm-up: imitating a pupil who mostly guesses"
miles train "$here/sft.yaml"
echo "--- reinforcement learning: a strands agent, and only whether its answers are right"
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} miles train "$here/config.yaml" "$@"
