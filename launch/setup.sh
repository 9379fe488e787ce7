#!/usr/bin/env bash
# Installs the toolkit with pinned versions; creates a virtual environment if none is active. With the second argument
# `oldest` it installs the oldest tested versions, always in an environment of their own, .venv-oldest.
# quickstart.sh and test.sh source it, so that the environment stays active; the first argument is an extra of pyproject.toml.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$here"

extras="${1:-}"
folder=.venv
[ "${2:-}" != oldest ] || folder=.venv-oldest
if [ -z "${VIRTUAL_ENV:-}" ] || [ "$folder" = .venv-oldest ]; then
    [ -d "$folder" ] || python3 -m venv "$folder"
    # shellcheck disable=SC1091
    . "$folder/bin/activate"
fi

constraints=constraints.txt
if [ "$folder" = .venv-oldest ]; then
    constraints="$VIRTUAL_ENV/constraints.txt"
    # A package in the first file loses its line in the second.
    awk -F'==' 'NR == FNR { oldest[$1]; print; next } !($1 in oldest)' constraints-oldest.txt constraints.txt > "$constraints"
fi
version="$(cat pyproject.toml "$constraints" | sha256sum | cut -d' ' -f1) $here $extras"
stamp="$VIRTUAL_ENV/.dpokit-installed"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$version" ]; then
    echo "installing dpokit with pinned versions into $VIRTUAL_ENV ..." >&2
    install=(python -m pip install --quiet --disable-pip-version-check --no-compile)
    # torch is installed first: an installed CPU-only build then satisfies all packages that need torch.
    "${install[@]}" "$(grep '^torch==' "$constraints")"
    # DeepSpeed compiles an operator when a run first needs it, and none now.
    DS_BUILD_OPS=0 "${install[@]}" -c "$constraints" -e ".${extras:+[$extras]}"
    # On all cores, where pip uses one. Some packages hold files for other versions of Python, which do not compile.
    python -m compileall -q -j 0 "$VIRTUAL_ENV/lib" > /dev/null 2>&1 || true
    echo "$version" > "$stamp"
fi
