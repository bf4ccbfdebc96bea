#!/usr/bin/env bash
# Serve a checkpoint. Usage: run.sh CHECKPOINT [further flags]; TP= and PP= divide the model over TP x PP processes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${1:?usage: run.sh CHECKPOINT [flags]}"
tp=${TP:-1} pp=${PP:-1}
launch=("${PYTHON:-python}")
if ((tp * pp > 1)); then
  launch+=(-m torch.distributed.run --nproc_per_node $((tp * pp)))
fi
exec "${launch[@]}" "$here/../../tools/text_generation_server.py" \
  --load "$1" --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp" "${@:2}"
