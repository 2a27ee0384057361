"""The custom-op library with int8 and int4 experts: against the kernel it wraps, its refusals, a whole bundle."""

from __future__ import annotations

import shutil

import numpy as np
import onnxruntime as ort
import pytest
from bundles import cpu_session, full_forward
from cpu_ops_helpers import built
from fake_cudart import HostDevice
from fused_models import one_node
from kernel_helpers import BF16, FP16, from_half, kernel_experts
from onnx import TensorProto
from ort_ops_helpers import CPU, in_fragments, library, quantised_model, session
from test_kernels_quantised import make_case
from test_ort_custom_ops import _assert_same_forward

from dmoe_export.bundle.reader import Bundle
from dmoe_export.errors import MissingRequirementError
from dmoe_export.ops.experts import QUANTISED_SCHEMA
from dmoe_export.ops.experts.fragments import LAYOUT
from dmoe_export.ops.mixture import QUANTISED_SCHEMA as MIXTURE
from dmoe_export.runtime.gpu.custom_ops import check_session, prepare_session
from dmoe_export.runtime.gpu.memory import Pool
from dmoe_export.runtime.gpu.shared_weights import SharedExperts
from dmoe_export.weight_formats import ExpertQuantisation

BYTES = {"gate_up": TensorProto.UINT8, "down": TensorProto.UINT8}
HALVES = [(FP16, TensorProto.FLOAT16), (BF16, TensorProto.BFLOAT16)]


def feeds_of(kind, case, scales):
    """A kernel's case as the inputs of `quantised_model`."""
    hidden, ids, weights, gate_up, down = case
    values = (from_half(hidden, kind), ids, weights, gate_up, down, *(from_half(part, kind) for part in scales))
    return dict(zip(QUANTISED_SCHEMA.inputs, values, strict=True))


@pytest.mark.parametrize(("kind", "half"), HALVES, ids=["fp16", "bf16"])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 64)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_equals_the_kernel(kind, half, bits, group, tokens):
    case, scales = make_case(kind, bits, group, tokens, 3, 8, 128, 64, seed=tokens)
    loaded = session(quantised_model(half, bits=bits, group_size=group), layout=LAYOUT)
    mixed = loaded.run(None, in_fragments(feeds_of(kind, case, scales), bits))[0]
    np.testing.assert_array_equal(mixed, from_half(kernel_experts(kind, *case, scales=scales), kind))


def test_no_tokens():
    case, scales = make_case(FP16, 4, 32, 0, 2, 3, 64, 32)
    run = session(quantised_model(TensorProto.FLOAT16, bits=4, group_size=32), layout=LAYOUT).run
    assert run(None, feeds_of(FP16, case, scales))[0].shape == (0, 64)


@pytest.mark.parametrize(("attributes", "text"), [
    ({"bits": 3, "group_size": 32}, "weights of 3 bits in groups of 32, where 4 or 8 bits in groups of 32, 64 or 128"),
    ({"bits": 8, "group_size": 48}, "weights of 8 bits in groups of 48, where"),
    ({"bits": 8}, "group_size"),
])
def test_attributes_are_refused_when_it_is_loaded(attributes, text):
    with pytest.raises(Exception, match=f"DmoeExperts: .*{text}"):
        session(quantised_model(TensorProto.FLOAT16, **attributes))


@pytest.mark.parametrize(("name", "shape", "text"), [
    ("gate_up", (3, 128, 64), r"gate_up has shape \[3, 128, 64\] where \[3, 128, 32\] is needed"),
    ("down", (3, 63, 32), r"down has shape \[3, 63, 32\] where \[any, 64, any\] is needed"),
    ("gate_up_scales", (3, 128, 1), r"gate_up_scales has shape \[3, 128, 1\] where \[3, 128, 2\] is needed"),
    ("down_scales", (3, 64, 4), r"down_scales has shape \[3, 64, 4\] where \[3, 64, 2\] is needed"),
])
def test_shapes_are_refused(name, shape, text):
    feeds = feeds_of(FP16, *make_case(FP16, 4, 32, 5, 2, 3, 64, 64))
    feeds[name] = np.zeros(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=f"DmoeExperts: {text}"):
        session(quantised_model(TensorProto.FLOAT16, bits=4, group_size=32), layout=LAYOUT).run(None, feeds)


@pytest.mark.parametrize("layout", [None, 1, 3])
@pytest.mark.parametrize("mixture", [False, True])
def test_another_order_is_refused_when_it_is_loaded(layout, mixture):
    """A plain session would compute with rows as if they were fragments."""
    attributes = {"bits": 4, "group_size": 32}
    model = one_node(MIXTURE, TensorProto.FLOAT16, BYTES, **attributes) if mixture else quantised_model(
        TensorProto.FLOAT16, **attributes)
    with pytest.raises(Exception, match=f"Dmoe{'Mixture' if mixture else 'Experts'}: the quantised experts lie in "
                       rf"layout {layout or 1}, these kernels read layout 2 \(1: rows, .*; open the bundle with dmoe-"):
        session(model, layout=layout)


def test_kernels_of_the_cpu_read_rows():
    model = quantised_model(TensorProto.FLOAT, bits=4, group_size=32)
    for layout in (None, 1):
        session(model, built(), layout=layout)
    with pytest.raises(Exception, match="the quantised experts lie in layout 2, these kernels read layout 1 "):
        session(model, built(), layout=LAYOUT)


def test_an_fp32_rest_is_refused(tiny_bundle):
    how = ExpertQuantisation(bits=4, group_size=32)
    experts = tiny_bundle.manifest.experts.model_copy(update={"quantisation": how})
    bundle = Bundle(tiny_bundle.folder, tiny_bundle.manifest.model_copy(update={"experts": experts}))
    with pytest.raises(MissingRequirementError, match="export with --compute fp16 --dense-precision fp16"):
        prepare_session(bundle, ort.SessionOptions(), library())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_bundle_equals_its_bodies(tiny_checkpoint, exported, precision, tmp_path):
    """With fp16 dense parts: one forward of two rows, one of them padded; experts are not read from the file again."""
    bundle = exported(tiny_checkpoint, precision=precision, dense_precision="fp16", compute="fp16", group_size=32)
    device = HostDevice()
    experts = SharedExperts(bundle, Pool(device), device.stream())
    options = ort.SessionOptions()
    kernels = prepare_session(bundle, options, library())
    experts.give(options, kernels)
    for name in ("denoiser.onnx", "denoiser.onnx.data"):
        shutil.copy(bundle.folder / name, tmp_path)
    (tmp_path / "experts.bin").touch()  # must be there, and nothing in it is asked for
    loaded = ort.InferenceSession(tmp_path / "denoiser.onnx", options, providers=[CPU])
    assert kernels.kernels("DmoeMixture") == len(bundle.manifest.experts.layers)
    check_session(loaded, CPU)
    prompt = np.random.default_rng(1).integers(0, bundle.manifest.model.mask_id, (2, 40))
    positions = np.tile(np.arange(40), (2, 1))
    positions[1, 25:] = -1
    settings = {"top_p": 0.6, "min_experts": 4}
    want = full_forward(cpu_session(bundle.denoiser_path), prompt, positions, **settings)
    _assert_same_forward(full_forward(loaded, prompt, positions, **settings), want, positions >= 0)
    plain = ort.SessionOptions()
    prepare_session(bundle, plain, library())
    with pytest.raises(Exception, match="DmoeMixture: the quantised experts lie in layout 1, these kernels read"):
        ort.InferenceSession(bundle.denoiser_path, plain, providers=[CPU])
