"""Comparisons of methods on one model and data set."""
