#!/usr/bin/env bash
# From text to a BERT, in one process. Usage: run.sh [OUTPUT] [further flags of pretrain_bert.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-runs/bert_tiny_cpu}
python=${PYTHON:-python}
tokenizer=(--tokenizer-type BertWordPieceLowerCase)

"$python" examples/quickstart/corpus.py "$out/corpus.jsonl"
"$python" tools/train_tokenizer.py "${tokenizer[@]}" --input "$out/corpus.jsonl" --vocab-size 1000 --output "$out"
tokenizer+=(--vocab-file "$out/vocab.txt")
"$python" tools/preprocess_data.py --input "$out/corpus.jsonl" --output-prefix "$out/corpus" "${tokenizer[@]}" --split-sentences
"$python" pretrain_bert.py --config examples/bert_tiny_cpu/run.toml "${tokenizer[@]}" \
  --data-path "$out/corpus_text_sentence" --save "$out/checkpoints" "${@:2}"
"$python" examples/bert_tiny_cpu/unigram.py "$out/checkpoints"
"$python" tools/plot_metrics.py "$out/checkpoints/metrics.jsonl" --output "$out/loss.svg"
