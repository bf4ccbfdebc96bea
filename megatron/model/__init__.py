"""The models. They know one axis, tensor parallelism, and read like a textbook."""
