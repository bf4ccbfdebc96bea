"""Convert a released archive of Megatron-LM's BERT to Hugging Face files in the same directory.

    python tools/convert_megatron_bert_checkpoint.py megatron_bert_345m_v0_1_uncased.zip

Writes config.json and model.safetensors. No code from the archive is executed. Exit
status: 0 done; 2 bad input; 1 a failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.interop.convert_released import main
    from megatron.interop.released_kinds import BERT_KIND

if __name__ == "__main__":
    sys.exit(run_main(main, BERT_KIND, __doc__))
