"""What weights are: a checkpoint folder → a typed description and tensors that are read lazily. Needs torch."""
