#!/usr/bin/env bash
# Run all checks: setup -> ruff -> imports -> types and pytest. Arguments go to pytest:  bash run_tests.sh -k markov
# With --faults as the first argument, run only the long form of the fault tests (up to 20 minutes).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The tests start hundreds of commands. Cache the bytecode, so that not every command compiles the modules again.
unset PYTHONDONTWRITEBYTECODE
DEVELOPMENT=1 source "$root/setup.sh"
cd "$root"
# The tests run commands with `python`, as a user does; put the right one first.
export PATH="$(dirname "$PYTHON"):$PATH"
# Three pytest processes run the tests, typically on two cores, because one of them often waits for a server or a timer.
# More threads per process would only compete for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
tests=("$PYTHON" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder)
if [ "${1:-}" = --faults ]; then
    shift
    exec "${tests[@]}" -m faults "$@"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())' --no-logo
# The types are checked while the tests run, because that needs only one core.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$PYTHON" -m mypy >"$types" 2>&1 &
checker=$! code=0
"${tests[@]}" "$@" || code=$?
wait "$checker" || code=1
cat "$types"
exit "$code"
