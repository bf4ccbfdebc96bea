#!/usr/bin/env bash
# Usage: run.sh DATA_PREFIX VOCAB_JSON MERGES_TXT SAVE [further flags]; GPUS= names the number of GPUs of this machine.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${4:?usage: run.sh DATA_PREFIX VOCAB_JSON MERGES_TXT SAVE [flags]}"
torchrun --nproc_per_node "${GPUS:-8}" "$here/../../pretrain_gpt.py" --config "$here/run.toml" \
  --data-path "$1" --vocab-file "$2" --merge-file "$3" --save "$4" "${@:5}"
