#!/usr/bin/env bash
# The one test command: set-up -> ruff -> imports -> types -> pytest. Arguments go to pytest:  bash run_tests.sh -k markov
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DEVELOPMENT=1 source "$root/setup.sh"
cd "$root"
# The tests start the real commands with the plain name `python`, as a user would.
export PATH="$(dirname "$PYTHON"):$PATH"
# The tests start hundreds of commands: none has to compile the project's files again.
unset PYTHONDONTWRITEBYTECODE
# Three processes share the tests, on two cores as a rule: one of them often waits for a server or a clock. More threads
# would only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m ruff check .
"$PYTHON" -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())' --no-logo
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
