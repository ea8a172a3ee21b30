"""The autograd functions that adapted modules run. They know tensors, not models."""
