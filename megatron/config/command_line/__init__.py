"""The words of a user: flags, `--help`, TOML files and a saved configuration, read into `RunSettings` and written from them."""
