"""The models. Their code contains no communication: a `TensorParallel` that is passed to them hides the parallel layout."""
