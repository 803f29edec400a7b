"""Checkpoints: a model with the weights that a point of a search gives it, in compressed-tensors' files."""
