"""Where every rank stands: the grid, its groups, and starting torch.distributed."""
