"""A process and its job: environment, signals, store, watchdog, and how it ends."""
