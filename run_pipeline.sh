#!/usr/bin/env bash
# Run all stages: setup -> data -> semantic IDs -> recommender -> results.  bash run_pipeline.sh --dataset ml-100k
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/setup.sh"
exec "$PYTHON" "$root/run_pipeline.py" "$@"
