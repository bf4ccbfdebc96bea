#!/usr/bin/env bash
# The run of ../gpt_tiny_cpu on 4 processes: tensor parallel 2 x pipeline parallel 2. Usage: run.sh [OUTPUT] [further flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-runs/gpt_tiny_4_ranks_cpu}
python=${PYTHON:-python}

"$python" examples/quickstart/corpus.py "$out/corpus.jsonl"
"$python" tools/preprocess_data.py --input "$out/corpus.jsonl" --output-prefix "$out/corpus" \
  --tokenizer-type ByteTokenizer --append-eod
OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --nproc_per_node 4 pretrain_gpt.py \
  --config examples/gpt_tiny_cpu/run.toml --tensor-model-parallel-size 2 --sequence-parallel \
  --pipeline-model-parallel-size 2 --pipeline-schedule zb-h1 \
  --data-path "$out/corpus_text_document" --save "$out/checkpoints" "${@:2}"
"$python" tools/generate.py --load "$out/checkpoints" --prompt "def " --max-new-tokens 100 --temperature 0.8 --seed 1
