#!/usr/bin/env bash
# Starts a program with torchrun, one process for each of the GPUS (default 8) of this machine. Usage: distributed.sh PROGRAM [flags]
# On NNODES machines the same command is given on each of them; they meet at MASTER_ADDR, the name of one.
set -euo pipefail
meet=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
  if [ -z "${MASTER_ADDR:-}" ]; then
    echo "error: NNODES=$NNODES machines need MASTER_ADDR, the name of one of them, where all meet" >&2
    exit 2
  fi
  meet=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id megatron --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-6000}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run --nproc-per-node "${GPUS:-8}" "${meet[@]}" "$@"
