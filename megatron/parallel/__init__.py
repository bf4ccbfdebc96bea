"""One tensor on several ranks: collectives, parallel layers, random streams, and what a parameter knows about itself."""
