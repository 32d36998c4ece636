"""Methods as pure functions: tensors and numbers in, tensors out. One file and one table row each."""
