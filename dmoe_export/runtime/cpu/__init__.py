"""ONNX Runtime's CPU provider, with our kernels where they are installed, and experts in a mapping of their file.

Imports runtime's own files and residency/, nothing of gpu/.
"""
