#!/usr/bin/env bash
# Evaluate a trained GPT zero-shot: accuracy of last words on LAMBADA, or with TASK=WIKITEXT103 the perplexity of a text.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 4 ]; then
  echo "usage: $(basename "$0") VALID_DATA VOCAB_JSON MERGES_TXT LOAD [further flags of tasks/main.py]" >&2
  exit 2
fi
task=(--task "${TASK:-LAMBADA}")
if [ "${task[1]}" = LAMBADA ]; then task+=(--strict-lambada); fi
"$here/distributed.sh" "$here/../../tasks/main.py" "${task[@]}" --valid-data "$1" \
  --tokenizer-type GPT2BPETokenizer --vocab-file "$2" --merge-file "$3" --load "$4" \
  --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024 \
  --micro-batch-size 8 --log-interval 10 "--${PRECISION:-fp16}" "${@:5}"
