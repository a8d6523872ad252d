# Source this file to set PYTHON to a Python with all packages of requirements.txt, and with DEVELOPMENT=1 also of
# requirements-dev.txt. The other scripts also source it. It uses the active Python if all packages are installed there;
# otherwise it creates .venv and installs the packages in it.
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
        echo "error: set-up: Python 3.11 or newer not found. Fix: install it, or set its path: PYTHON=... bash ..." >&2
        return 2
    fi
    PYTHON="$root/.venv/bin/python"
    [ -x "$PYTHON" ] || "$base" -m venv "$root/.venv" || return 5
    # If torch is already installed, keep the version that the user has chosen.
    "$PYTHON" -c 'import torch' 2>/dev/null || pip=(--constraint "$root/constraints.txt")
    # pip would compile all modules, which takes half of the time. Python compiles those that are imported, if it may.
    [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || pip+=(--no-compile)
    for python in "${requirements[@]}"; do pip+=(--requirement "$python"); done
    if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check "${pip[@]}"; then
        echo "error: set-up: cannot install the packages. Fix: make a Python package index reachable," \
             "or activate a Python with all packages of requirements.txt" >&2
        return 5
    fi
    export PYTHON
}
set_up_python
