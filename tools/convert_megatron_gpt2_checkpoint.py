"""Convert a released archive of Megatron-LM's GPT-2 to Hugging Face files in the same directory.

    python tools/convert_megatron_gpt2_checkpoint.py megatron_gpt2_345m_v0_0.zip

Writes config.json and model.safetensors, and the tokenizer's files if they are on this machine. No code from the archive is
executed. Exit status: 0 done; 2 bad input; 1 a failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.interop.convert_released import main
    from megatron.interop.released_kinds import GPT2_KIND

if __name__ == "__main__":
    sys.exit(run_main(main, GPT2_KIND, __doc__))
