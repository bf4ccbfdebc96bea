"""Open an exported directory with stock transformers classes, nothing of this package, and let the model write.

    python examples/quickstart/open_in_transformers.py runs/quickstart/hf --prompt "The statement"

Exit status 1 when weights are missing, left over or of another shape, or when nothing comes out.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the directory holds all there is to load

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils.logging import disable_progress_bar

    from megatron.launch.tool_parser import ToolParser, non_empty_path


def main() -> int:
    """Run the program, and return its exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=non_empty_path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=60)
    arguments = parser.parse_args()
    if not (arguments.directory / "config.json").is_file():
        print(f"error: {arguments.directory} is no Hugging Face directory (no config.json)", file=sys.stderr)
        return 2
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.directory)
    model, loading = AutoModelForCausalLM.from_pretrained(arguments.directory, output_loading_info=True)
    wrong = {kind: sorted(loading[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading[kind]}
    if wrong:
        print(f"error: the weights do not fit the model: {wrong}", file=sys.stderr)
        return 1
    set_seed(1)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=True, temperature=0.8, top_k=40)
    written = output[0, inputs["input_ids"].shape[1] :]
    if not len(written):
        print("error: the model wrote nothing", file=sys.stderr)
        return 1
    print(f"{type(model).__name__}, {type(tokenizer).__name__}:\n{tokenizer.decode(output[0], skip_special_tokens=True)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
