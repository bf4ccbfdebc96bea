#!/usr/bin/env bash
# Fine-tune a pretrained BERT on RACE: multiple choice with four answers. RACE is the directory of train, dev and test.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 4 ]; then
  echo "usage: $(basename "$0") RACE VOCAB_TXT PRETRAINED SAVE [further flags of tasks/main.py]" >&2
  exit 2
fi
"$here/distributed.sh" "$here/../../tasks/main.py" --task RACE --epochs 3 \
  --train-data "$1/train/middle" --valid-data "$1/dev/middle" "$1/dev/high" \
  --tokenizer-type BertWordPieceLowerCase --vocab-file "$2" --pretrained-checkpoint "$3" --save "$4" --auto-resume --save-interval 100000 \
  --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 --max-position-embeddings 512 \
  --micro-batch-size 4 --lr 1e-5 --lr-decay-style linear --lr-warmup-fraction 0.06 --weight-decay 0.1 --clip-grad 1.0 \
  --hidden-dropout 0.1 --attention-dropout 0.1 --recompute-granularity full --recompute-method uniform \
  --log-interval 10 --eval-interval 100 --eval-iters 50 "--${PRECISION:-fp16}" "${@:5}"
