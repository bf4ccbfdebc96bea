"""Hooks: work between the steps of a run, one hook a file; `pretraining.build_hooks` has their order."""
