"""The eager reference: a small PyTorch masked-diffusion transformer, rebuilt from a model description."""
