"""Evaluation and fine-tuning: what tasks/main.py does."""
