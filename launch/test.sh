#!/usr/bin/env bash
# Set-up, lint, types and the test suite. Without arguments the fast tests, three at a time; --slow adds the tests that take
# minutes. All arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# On CPU much of a step is memory given back to the system and taken again: glibc is told to keep it.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000
ruff check .
ruff format --check .
mypy
[ $# -gt 0 ] || set -- -n 3 --dist worksteal -m "not alone"
exec python -m pytest "$@"
