"""What a run is: the schema, its rules, and the command line made from it. Imports no torch."""
