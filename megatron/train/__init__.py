"""Build and run a training job: steps, the loop, evaluations, checkpoints, reports."""
