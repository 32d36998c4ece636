"""Sparse deltas as objects, in memory and on disk."""
