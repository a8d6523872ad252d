#!/usr/bin/env bash
# The data part: download, process, embed. All steps take the same flags.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for step in 0_download_dataset 2_process 3_get_text_emb; do
    bash "$here/$step.sh" "$@"
done
