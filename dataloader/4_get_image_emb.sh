#!/usr/bin/env bash
# Embed the images of the items.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/setup.sh"
# -P keeps the current folder, which may be another checkout, off the import path.
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -P -m dataloader.image_embedding "$@"
