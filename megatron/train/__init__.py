"""Putting it together: building a run, the step, the loop, evaluation, what is reported."""
