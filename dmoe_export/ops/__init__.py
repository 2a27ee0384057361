"""The custom ops, each stated once: schema, eager implementation, ONNX body (one folder per op)."""
