#!/usr/bin/env bash
# Makes the toolkit ready on a fresh machine: a virtual environment where none is active, and pinned versions.
# Sourced by quickstart.sh and test.sh (so that the environment stays active); extras of pyproject.toml as arguments.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$here"

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -d .venv ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi

extras="${1:-}"
wanted="$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1) $here $extras"
stamp="$VIRTUAL_ENV/.dpokit-installed"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    echo "installing dpokit with pinned versions into $VIRTUAL_ENV ..." >&2
    # torch first and by itself: a CPU-only build that is at hand then serves all that need torch.
    python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    # DeepSpeed compiles what a run needs when it needs it, not all it has now.
    DS_BUILD_OPS=0 python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
    echo "$wanted" > "$stamp"
fi
