"""Putting adapters into a model, changing its modules there, and taking adapters out again."""
