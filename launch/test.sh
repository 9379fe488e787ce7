#!/usr/bin/env bash
# Sets the toolkit up, then runs linter, type checker and tests. Without arguments it runs the fast tests in three processes;
# --slow adds the tests that take minutes. All arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# On CPU much of a step's time goes into returning memory to the system; these variables make glibc keep it.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000
ruff check .
ruff format --check .
mypy
[ $# -gt 0 ] || set -- -n 3 --dist worksteal -m "not alone"
exec python -m pytest "$@"
