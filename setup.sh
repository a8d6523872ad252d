# Sourced by the other scripts (or by you): sets PYTHON to a Python that has what requirements.txt names, and with
# DEVELOPMENT=1 also requirements-dev.txt. The active Python is used if it has it all; else .venv is made and filled.
set_up_python() {
    local root python base="" pip=()
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    local requirements=("$root/requirements.txt")
    [ -z "${DEVELOPMENT:-}" ] || requirements+=("$root/requirements-dev.txt")
    for python in "${PYTHON:-python}" python3 "$root/.venv/bin/python"; do
        if "$python" -P "$root/common/environment.py" "${requirements[@]}" >/dev/null 2>&1; then
            PYTHON=$(command -v "$python")
            export PYTHON
            return 0
        fi
    done
    echo "set-up: the active Python lacks packages; installing into $root/.venv" >&2
    for python in "${PYTHON:-python}" python3 python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then base=$python; break; fi
    done
    if [ -z "$base" ]; then
        echo "error: set-up: no Python 3.11 or newer was found. Fix: install one, or name it: PYTHON=... bash ..." >&2
        return 2
    fi
    PYTHON="$root/.venv/bin/python"
    [ -x "$PYTHON" ] || "$base" -m venv "$root/.venv" || return 5
    # Where torch is there already, its version is the user's choice.
    "$PYTHON" -c 'import torch' 2>/dev/null || pip=(--constraint "$root/constraints.txt")
    for python in "${requirements[@]}"; do pip+=(--requirement "$python"); done
    if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check "${pip[@]}"; then
        echo "error: set-up: the packages could not be installed. Fix: make a Python package index reachable," \
             "or activate a Python that has them (requirements.txt)" >&2
        return 5
    fi
    export PYTHON
}
set_up_python
