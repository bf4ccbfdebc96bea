"""What a user types: flags, `--help`, TOML files and a saved configuration, read into and written from a `RunConfig`."""
