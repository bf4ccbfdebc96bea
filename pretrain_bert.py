"""Pretrain a BERT: `torchrun --nproc_per_node N pretrain_bert.py --flags`, or plain `python` for one process.

The recipe is `megatron/cli/program.py`; all flags are in `--help`, and `--dry-run` says what a command would do. The data are
sentences: `tools/preprocess_data.py --split-sentences`.
"""

import sys

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.cli.program import PRETRAINING_DEFAULTS, pretrain

if __name__ == "__main__":
    sys.exit(run_main(pretrain, sys.argv[1:], program="pretrain_bert.py", defaults=PRETRAINING_DEFAULTS["bert"]))
