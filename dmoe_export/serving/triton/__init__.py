"""A bundle as a model of Triton's Python backend: `model.py` is what Triton loads."""
