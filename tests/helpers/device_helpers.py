"""Device backends without a device: the fake CUDA runtime below, ONNX Runtime's CPU provider inside."""

from __future__ import annotations

from candidates_helpers import emulated_ops
from fake_cudart import HostDevice

from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.runtime.gpu.backend import DeviceBackend
from dmoe_export.runtime.gpu.candidates import CandidateKernel
from dmoe_export.runtime.gpu.memory import Pool
from dmoe_export.runtime.gpu.onnxruntime import OnnxRuntimeExecutor
from dmoe_export.runtime.gpu.shared_weights import SharedExperts


class HostExecutor(OnnxRuntimeExecutor):
    """The session runs when its turn on the stream comes, as the CUDA provider's would."""

    def __init__(self, bundle, device, recordable, graph=None, experts=None, custom_ops=None):
        super().__init__(bundle, device, "CPUExecutionProvider", graph=graph, experts=experts, custom_ops=custom_ops)
        self._fake, self._recordable = device.fake, recordable
        self.sizes = []  # of every call

    def execute(self, call, stream):
        self.sizes.append(call.sizes)
        self._fake.enqueue(stream, lambda: OnnxRuntimeExecutor.execute(self, call, stream))

    def isolate(self, call, stream):
        return _Launcher(self, call) if self._recordable else None


class _Launcher:
    host_reads = False

    def __init__(self, executor, call):
        self._executor, self._call = executor, call

    def __call__(self, stream):
        self._executor.execute(self._call, stream)

    def capturable(self, stream):
        return True


def host_backend(bundle, cuda_graphs=False, recordable=True, custom_ops=None, **device_options):
    """A DeviceBackend on host memory; its parts are attributes for the tests. `custom_ops`: a library of kernels."""
    device = HostDevice(**device_options)
    pool, stream = Pool(device), device.stream()
    manifest = bundle.manifest
    shared = manifest.experts and (manifest.salient or (custom_ops and manifest.quantisation))
    experts = SharedExperts(bundle, pool, stream, custom_ops is not None) if shared else None
    executor = HostExecutor(bundle, device, recordable, experts=experts, custom_ops=custom_ops)
    salient = {}

    def find_graph(graph):
        return lambda: salient.setdefault(graph.file,
                                          HostExecutor(bundle, device, recordable, graph, experts, custom_ops))

    backend = DeviceBackend("host", bundle, device, pool, stream, executor, find_graph, cuda_graphs)
    backend.fake, backend.executor, backend.salient_executors = device.fake, executor, salient
    return backend


def ranking(backend):
    """The backend with the emulated kernel for candidates, which runs when its turn on the stream comes."""
    class Kernel(CandidateKernel):
        def enqueue(self, *arguments):
            backend.fake.enqueue(arguments[-1], lambda: CandidateKernel.enqueue(self, *arguments))

    backend._logits._opened, backend._logits._kernel = True, Kernel(emulated_ops())
    return backend


def decode(backend, prompts, **options):
    """Tokens of every prompt, and its last block."""
    tokens, last = {i: [] for i in range(len(prompts))}, {}
    for block in BlockDiffusion(backend, DecodeSettings(**options)).decode(prompts):
        tokens[block.index] += block.token_ids
        last[block.index] = block
    return [tokens[i] for i in range(len(prompts))], [last[i] for i in range(len(prompts))]
