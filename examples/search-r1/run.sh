#!/usr/bin/env bash
# Data, index, retrieval server, warm-up, reinforcement learning. Run again, it goes on where it stopped.
#
#   examples/search-r1/run.sh [FLAG ...]        writes runs/search-r1; flags go to the reinforcement learning
#   PORT=9000 examples/search-r1/run.sh         another port for the retrieval server than 8000
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
port=${PORT:-8000}
mkdir -p "$here/../../runs/search-r1"
cd "$here/../../runs/search-r1"

[[ -d data ]] || { rm -rf data.part; python "$here/make_data.py" --out data.part; mv data.part data; }
[[ -f index/index.json ]] || miles search index data/corpus.jsonl --out index --model wordllama
echo "--- warm-up: imitating a pupil who can search and mostly guesses"
miles train "$here/sft.yaml"

true >server.log  # that of an earlier run says that it is there, too
miles search serve index --port "$port" >server.log 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT
until grep -q passages server.log; do
    kill -0 "$server" 2>/dev/null || { cat server.log >&2; exit 1; }
    sleep 0.2
done
echo "--- reinforcement learning: other questions, and what an answer is worth"
miles train "$here/config.yaml" --search-r1-url "http://127.0.0.1:$port/retrieve" "$@"
