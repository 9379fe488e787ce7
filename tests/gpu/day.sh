#!/usr/bin/env bash
# A GPU day: everything that only a GPU can show, most valuable first, in the minutes that a GPU is there (docs/gpu-day.md).
#   bash tests/gpu/day.sh [--minutes 12] [--dry-run] [--only STAGE ...]
# Results go to $OUT, or to runs/gpu-day. What tests/gpu/pack.sh packed into .gpu/ is used if it is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
site=
if [ -f .gpu/site.tar.xz ]; then
    # dill, which hashes functions for datasets, knows an installed package by this name in its path.
    site="${TMPDIR:-/tmp}/dpokit-$(id -u)-$(cksum < .gpu/site.tar.xz | tr ' ' -)/site-packages"
    if [ ! -d "$site" ]; then
        rm -rf "$site.part"
        mkdir -p "$site.part"
        tar xf .gpu/site.tar.xz -C "$site.part"
        mv "$site.part" "$site"
    fi
    [ ! -d .gpu/shared ] || export DPOKIT_SHARED="${DPOKIT_SHARED:-$PWD/.gpu/shared}"
fi
export PYTHONPATH="${site:+$site:}$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
python="${PYTHON:-}"
for candidate in .venv/bin/python python3; do
    [ -n "$python" ] || ! command -v "$candidate" > /dev/null || python="$candidate"
done
exec "$python" tests/gpu/day.py "$@"
