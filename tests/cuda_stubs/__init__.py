"""Stubs of CUDA's libraries, and programs that run ONNX Runtime's CUDA provider on them."""
