"""Weights and training state on disk, in a form no layout shows in; and Hugging Face's form."""
