#!/usr/bin/env bash
# Fetch the raw files of a dataset.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/setup.sh"
# With -P, Python does not import modules from the current folder, which may be another checkout.
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -P -m dataloader.download "$@"
