"""Packages that this one depends on, and commands that install them. Imports nothing, and runs on Python 3.6 or later.

On PyPI the name `megatron` belongs to another project, so the commands install from this checkout.
"""

REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece")
EXTRAS = {  # optional module -> the extra of pyproject.toml that installs it
    "transformers": "hf",
    "tensorboard": "tensorboard",
    "zstandard": "zstd",
    "lm_eval": "eval",
    "starlette": "server",
    "uvicorn": "server",
    "jinja2": "server",
    "pdoc": "docs",
    "markdown2": "docs",
}


def install_command(module: str) -> str:
    """Return the command that installs a module's package, to be run in the project's directory; quoted for any shell."""
    extra = EXTRAS.get(module)
    return f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
