"""Evaluate a model, or fine-tune one: `tasks/main.py --task MNLI --pretrained-checkpoint CKPT --train-data F ...`.

Under torchrun on any layout, or plain `python` for one process. The model's sizes and its tokenizer come from the checkpoint;
all flags are in `--help`.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.cli.program import run_task

DEFAULTS = {"batch.micro_batch_size": 8}

if __name__ == "__main__":
    sys.exit(run_main(run_task, sys.argv[1:], program="tasks/main.py", defaults=DEFAULTS))
