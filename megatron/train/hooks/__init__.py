"""Hooks, which do the work between the steps of a run; `pretraining.build_hooks` defines their order."""
