"""Predicts what a training run will take, before anything is downloaded or trained."""
