"""Checkpoint → bundle: trace the eager model to ONNX, stream its weights, seal. Needs torch."""
