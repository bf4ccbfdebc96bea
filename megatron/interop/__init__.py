"""Every foreign format: Hugging Face directories, Megatron-LM's checkpoints, NVIDIA's released archives."""
