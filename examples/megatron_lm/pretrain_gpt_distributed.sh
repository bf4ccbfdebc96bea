#!/usr/bin/env bash
# GPT, data parallel over all GPUs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 4 ]; then
  echo "usage: $(basename "$0") DATA_PREFIX VOCAB_JSON MERGES_TXT SAVE [further flags of pretrain_gpt.py]" >&2
  exit 2
fi
"$here/distributed.sh" "$here/../../pretrain_gpt.py" --config "$here/gpt_345m.toml" "--${PRECISION:-fp16}" \
  --micro-batch-size 8 --global-batch-size 64 \
  --data-path "$1" --vocab-file "$2" --merge-file "$3" --save "$4" "${@:5}"
