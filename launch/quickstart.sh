#!/usr/bin/env bash
# A whole preference-training run in minutes on two CPU cores: set-up, then recipes/dpo_quickstart.py.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/dpo_quickstart.py "$@"
