"""Read and write files: never over what is read, whole or not at all, and only where nobody else can interfere."""
