#!/usr/bin/env bash
# Installs the toolkit with pinned versions; creates a virtual environment if none is active.
# quickstart.sh and test.sh source it, so that the environment stays active; the argument is an extra of pyproject.toml.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$here"

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -d .venv ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi

extras="${1:-}"
version="$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1) $here $extras"
stamp="$VIRTUAL_ENV/.dpokit-installed"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$version" ]; then
    echo "installing dpokit with pinned versions into $VIRTUAL_ENV ..." >&2
    # torch is installed first: an installed CPU-only build then satisfies all packages that need torch.
    python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    # DeepSpeed compiles an operator when a run first needs it, and none now.
    DS_BUILD_OPS=0 python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
    echo "$version" > "$stamp"
fi
