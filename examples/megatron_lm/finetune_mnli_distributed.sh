#!/usr/bin/env bash
# Fine-tune a pretrained BERT on MNLI: does one sentence follow from another? GLUE_MNLI is the directory of train.tsv and dev_*.tsv.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 4 ]; then
  echo "usage: $(basename "$0") GLUE_MNLI VOCAB_TXT PRETRAINED SAVE [further flags of tasks/main.py]" >&2
  exit 2
fi
"$here/distributed.sh" "$here/../../tasks/main.py" --task MNLI --epochs 5 \
  --train-data "$1/train.tsv" --valid-data "$1/dev_matched.tsv" "$1/dev_mismatched.tsv" \
  --tokenizer-type BertWordPieceLowerCase --vocab-file "$2" --pretrained-checkpoint "$3" --save "$4" --auto-resume --save-interval 500000 \
  --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 --max-position-embeddings 512 \
  --micro-batch-size 8 --lr 5e-5 --lr-decay-style linear --lr-warmup-fraction 0.065 --weight-decay 0.1 \
  --recompute-granularity full --recompute-method uniform \
  --log-interval 10 --eval-interval 100 --eval-iters 50 "--${PRECISION:-fp16}" "${@:5}"
