#!/usr/bin/env bash
# BERT, each copy of the model on 4 GPUs (tensor parallel 2, pipeline parallel 2), data parallel over the copies.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 3 ]; then
  echo "usage: $(basename "$0") DATA_PREFIX VOCAB_TXT SAVE [further flags of pretrain_bert.py]" >&2
  exit 2
fi
"$here/distributed.sh" "$here/../../pretrain_bert.py" --config "$here/bert_345m.toml" "--${PRECISION:-fp16}" \
  --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 16 \
  --data-path "$1" --vocab-file "$2" --save "$3" "${@:4}"
