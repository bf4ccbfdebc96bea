"""The models. They are handed one `TensorParallel` and read like a textbook."""
