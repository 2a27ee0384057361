"""A CUDA device: its memory, calls and recorded graphs; TensorRT and ONNX Runtime's CUDA provider on it; expert pools.

Imports runtime's own files and residency/, nothing of cpu/.
"""
