#!/usr/bin/env bash
# From text to a sample of text, in one process. Usage: run.sh [OUTPUT] [further flags of pretrain_gpt.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-runs/gpt_tiny_cpu}
python=${PYTHON:-python}

"$python" examples/quickstart/corpus.py "$out/corpus.jsonl"
"$python" tools/preprocess_data.py --input "$out/corpus.jsonl" --output-prefix "$out/corpus" \
  --tokenizer-type ByteTokenizer --append-eod
"$python" pretrain_gpt.py --config examples/gpt_tiny_cpu/run.toml \
  --data-path "$out/corpus_text_document" --save "$out/checkpoints" "${@:2}"
"$python" tools/generate.py --load "$out/checkpoints" --prompt "def " --max-new-tokens 100 --temperature 0.8 --seed 1
