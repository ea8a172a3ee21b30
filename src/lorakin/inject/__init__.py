"""Putting adapters into a model: which modules, how they are changed there, and taking them out again."""
