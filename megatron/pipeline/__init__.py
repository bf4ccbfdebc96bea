"""The order of work: schedules and the executor that runs them."""
