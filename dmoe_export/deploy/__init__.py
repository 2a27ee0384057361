"""Files with which an engine that others wrote runs a bundle: Ray Serve, Triton Inference Server, Kubernetes."""
