"""Command line, `--help`, TOML files and saved configurations: read into `RunSettings`, and written from them."""
