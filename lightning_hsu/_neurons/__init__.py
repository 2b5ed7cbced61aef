"""From a model or a state dict to its sets of neurons."""
