#!/usr/bin/env bash
# Sets the toolkit up, then runs linter, type checker and tests. Without arguments it runs the fast tests in three processes;
# --slow adds the tests that take minutes. A first argument --oldest runs the tests alone, with the oldest versions. All other
# arguments go to pytest.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
if [ "${1:-}" = --oldest ]; then
    shift
    . "$here/setup.sh" dev oldest
else
    . "$here/setup.sh" dev
    ruff check .
    ruff format --check .
    mypy
fi
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# On CPU much of a step's time goes into returning memory to the system; these variables make glibc keep it.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000
[ $# -gt 0 ] || set -- -n 3 --dist worksteal -m "not alone"
exec python -m pytest "$@"
