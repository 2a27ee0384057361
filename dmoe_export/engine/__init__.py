"""Bundle → engine files: TensorRT and TensorRT-RTX from one code path, without owning a GPU. No torch."""
