#!/usr/bin/env bash
# Build the image of this recipe. Untested: no container engine was at hand where this was written.
set -euo pipefail
cd "$(dirname "$0")/../.."
docker build --file examples/qwen3-0.6b-grpo/Dockerfile --tag miles-qwen3-0.6b-grpo .
