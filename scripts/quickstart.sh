#!/usr/bin/env bash
# From nothing to a small model that visibly learns arithmetic by reinforcement learning, on a CPU.
#
#   scripts/quickstart.sh [--seed N]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
exec bash examples/quickstart/run.sh "$@"
