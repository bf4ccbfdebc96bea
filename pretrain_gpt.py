"""Pretrain a GPT: `torchrun --nproc_per_node N pretrain_gpt.py --flags`, or plain `python` for one process.

The recipe is `megatron/cli/program.py`; all flags are in `--help`, and `--dry-run` says what a command would do.
"""

import sys

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.cli.program import PRETRAINING_DEFAULTS, pretrain

if __name__ == "__main__":
    sys.exit(run_main(pretrain, sys.argv[1:], program="pretrain_gpt.py", defaults=PRETRAINING_DEFAULTS["gpt"]))
