"""Configuration of a run: the schema, its rules, and the command line made from it. Imports no torch."""
