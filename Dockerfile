# dmoe-export on NVIDIA's TensorRT image, for the datacenter flavour; docs/container.md tells how to use it.
# 26.07 has TensorRT 11.1 (the headers our plugins are tested with), CUDA 13.3 and Python 3.12.
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:26.07-py3

# What compiling leaves behind stays in this stage.
FROM ${TENSORRT_IMAGE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /usr/src/dmoe-export
COPY . .
# export brings torch, for reading checkpoints; tensorrt alone builds and runs bundles; serve is the HTTP server.
ARG EXTRAS=tensorrt,export,cpu,serve
ARG CODE=
RUN samples/deploy/install.sh --venv /usr/local/dmoe-export --system-packages --extras "${EXTRAS}" ${CODE:+--code "${CODE}"}

# The same image once more: its layers are shared, and the environment sees its TensorRT.
FROM ${TENSORRT_IMAGE}
RUN useradd --create-home --uid 10001 dmoe && install --directory --owner dmoe /bundles
COPY --from=build /usr/local/dmoe-export /usr/local/dmoe-export
ENV PATH=/usr/local/dmoe-export/bin:${PATH}
USER 10001
WORKDIR /bundles
ENTRYPOINT ["dmoe-export"]
CMD ["--help"]
