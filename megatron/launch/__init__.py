"""The start and end of a process in a job: launch environment, device, store, signals, watchdog, exit status."""
