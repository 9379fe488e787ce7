#!/usr/bin/env bash
# Sets the toolkit up, then runs recipes/dpo_quickstart.py: preference training in minutes on two CPU cores.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
exec accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/dpo_quickstart.py "$@"
