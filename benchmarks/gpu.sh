#!/usr/bin/env bash
# Run the tests and the measurements on a GPU:  bash benchmarks/gpu.sh COMMAND [--smoke] [--python PYTHON]
# COMMAND is tests, speed, quality, precision, page or all. Nothing is downloaded. benchmarks/README.md has more.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        --python) python=${2:?--python needs a value}; shift 2 ;;
        --python=*) python=${1#*=}; shift ;;
        *) arguments+=("$1"); shift ;;
    esac
done
exec "$python" "$root/benchmarks/gpu.py" ${arguments[@]+"${arguments[@]}"}
