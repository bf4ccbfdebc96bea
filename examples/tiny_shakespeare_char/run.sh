#!/usr/bin/env bash
# Usage: examples/tiny_shakespeare_char/run.sh TEXT [OUTPUT] [further flags of pretrain_gpt.py]
set -euo pipefail
text=$(realpath "${1:?usage: run.sh TEXT [OUTPUT] [flags]}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${2:-runs/tiny_shakespeare_char}
python=${PYTHON:-python}
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/tokenizer.json")

"$python" examples/tiny_shakespeare_char/prepare.py "$text" "$out"
for part in train valid; do
  "$python" tools/preprocess_data.py --input "$out/$part.jsonl" --output-prefix "$out/$part" "${tokenizer[@]}"
done
"$python" pretrain_gpt.py --config examples/tiny_shakespeare_char/run.toml "${tokenizer[@]}" \
  --train-data-path "$out/train_text_document" --valid-data-path "$out/valid_text_document" \
  --save "$out/checkpoints" "${@:3}"
