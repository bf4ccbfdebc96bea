"""From gradients to updated weights: buffers, norm, learning rate, optimizer."""
