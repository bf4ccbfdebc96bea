"""Distributed training of large transformer language models with tensor and pipeline parallelism."""

__version__ = "0.1.0"
