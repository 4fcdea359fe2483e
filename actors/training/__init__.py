"""One micro-batch of many runs through the model, and back: packing, losses, gradients, steps. Knows no turn."""
