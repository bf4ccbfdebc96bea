#!/usr/bin/env bash
# BERT, data parallel over all GPUs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 3 ]; then
  echo "usage: $(basename "$0") DATA_PREFIX VOCAB_TXT SAVE [further flags of pretrain_bert.py]" >&2
  exit 2
fi
"$here/distributed.sh" "$here/../../pretrain_bert.py" --config "$here/bert_345m.toml" "--${PRECISION:-fp16}" \
  --micro-batch-size 4 --global-batch-size 32 \
  --data-path "$1" --vocab-file "$2" --save "$3" "${@:4}"
