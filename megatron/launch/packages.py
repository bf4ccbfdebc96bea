"""The packages that this one needs, or a part of it, and how they are installed. Standard library alone, for any Python 3.

On the package index the name `megatron` is somebody else's, so the commands name this checkout.
"""

REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece")
EXTRAS = {
    "transformers": "hf",
    "tensorboard": "tensorboard",
    "zstandard": "zstd",
    "lm_eval": "eval",
    "starlette": "server",
    "uvicorn": "server",
    "jinja2": "server",
}


def install_command(module: str) -> str:
    """Return the command that installs a module's package, to be typed in the project's directory; quoted for any shell."""
    extra = EXTRAS.get(module)
    return f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
