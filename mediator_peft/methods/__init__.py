"""Leaves: tensors and plain numbers in, tensors out. One file a method, one row a method in its table."""
