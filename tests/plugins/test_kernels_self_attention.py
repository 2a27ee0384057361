"""The kernels of `DmoeSelfAttention`, emulated, against the eager op in float32 on the same 16-bit values."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import BF16, FP16, KernelError, Output, check, from_half, library, pointer
from self_attention_helpers import Case, Sizes, assert_right, make_case, run

COMMON = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KINDS = pytest.mark.parametrize("kind", [FP16, BF16], ids=["fp16", "bf16"])
NAN = 0x7fff


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)


@st.composite
def any_sizes(draw):
    dim, share = 16 * draw(st.integers(1, 8)), draw(st.integers(1, 5))
    kv_heads = draw(st.integers(1, 2))
    rows, tokens, past = draw(st.integers(1, 2)), draw(st.integers(1, 20)), draw(st.integers(1, 150))
    rotary, block_length = 2 * draw(st.integers(1, dim // 2)), draw(st.sampled_from([0, 1, 5, 32]))
    return Sizes(rows, tokens, past, share * kv_heads, kv_heads, dim, rotary, block_length)


@KINDS
@COMMON
@given(any_sizes(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.booleans(), st.sampled_from([0.1, 1.0, 3.0]))
def test_any_size(kind, sizes, seed, order, norms, spread):
    """Positions in any order, some of them repeated or free."""
    library().dmoe_emulation_seed(order)
    rng = np.random.default_rng(seed)
    case = make_case(kind, sizes, seed, norms, spread)
    new = rng.integers(-1, 80, (sizes.rows, sizes.tokens))
    assert_right(case.with_positions(new, rng.integers(-1, 80, (sizes.rows, sizes.past))))


@KINDS
@pytest.mark.parametrize("sizes", [
    Sizes(head_dim=32, rotary_dim=32),
    Sizes(head_dim=8, rotary_dim=4),
    Sizes(head_dim=72, rotary_dim=36, past=140, tokens=9),
    Sizes(head_dim=64, rotary_dim=16, tokens=1, past=1),
    Sizes(head_dim=80, rotary_dim=80, tokens=17, past=129),
    Sizes(head_dim=96, rotary_dim=48, heads=3, kv_heads=3),
    Sizes(head_dim=128, rotary_dim=64, heads=8, kv_heads=2, past=260),             # LLaDA2.0-mini's heads
    Sizes(head_dim=256, rotary_dim=128, heads=2, kv_heads=1, tokens=40),           # two pairs of columns a warp
    Sizes(head_dim=160, rotary_dim=2, heads=1, tokens=3, past=200),
    Sizes(head_dim=16, rotary_dim=16, heads=2, past=2300, tokens=6),               # chunks of 384
    Sizes(head_dim=16, rotary_dim=16, heads=50, kv_heads=50, past=130, tokens=20),  # tiles of 64 rows
    Sizes(head_dim=16, rotary_dim=8, heads=64, kv_heads=64, past=130, tokens=5),    # a thread block has all chunks
    Sizes(head_dim=16, rotary_dim=8, heads=128, kv_heads=64, past=1, tokens=35),    # and 64 rows
    Sizes(head_dim=144, rotary_dim=8, heads=64, kv_heads=64, past=1, tokens=3),
], ids=lambda s: f"{s.rows}x{s.tokens}of{s.past}dim{s.head_dim}")
def test_every_variant(kind, sizes):
    library().dmoe_emulation_seed(sizes.tokens)
    assert_right(make_case(kind, sizes, seed=sizes.past))


@KINDS
def test_without_norms_the_key_is_only_rotated(kind):
    case = make_case(kind, Sizes(rotary_dim=32), norms=False)
    assert_right(case)
    _, key, _ = run(case)
    new = case.qkv[:, 4 * 64:5 * 64].reshape(1, 32, 1, 64).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(key[..., 32:], new[..., 32:])
    assert (key[..., :32] != new[..., :32]).any()


@KINDS
def test_a_token_that_sees_nothing_gets_zeros(kind):
    """Nothing but padding; and a block whose own and earlier places are all free."""
    case = make_case(kind, Sizes(rows=2, tokens=10, past=40, block_length=4))
    past = np.full((2, 40), -1)
    past[1, 7] = 50
    new = np.full((2, 10), -1)
    new[1, 3:] = 60
    assert_right(case.with_positions(new, past))
    mixed = run(case.with_positions(new, past))[0].reshape(2, 10, -1)
    assert not mixed[0].any() and not mixed[1, :3].any() and mixed[1, 3:].any(axis=-1).all()


@KINDS
@pytest.mark.parametrize("block_length", [0, 32])
def test_nan_in_a_free_place_does_not_matter(kind, block_length):
    case = make_case(kind, Sizes(past=150, block_length=block_length))
    clean = assert_right(case)
    free = case.past_positions[0] < 0
    assert free.any()
    key, value = case.past_key.copy(), case.past_value.copy()
    key[:, :, free], value[:, :, free] = NAN, NAN
    np.testing.assert_array_equal(run(replace(case, past_key=key, past_value=value))[0], clean)


@KINDS
def test_nan_that_is_seen_is_nan_and_ends(kind):
    """In a key: of the head that has it. Nothing hangs, nothing else turns."""
    case = make_case(kind, Sizes(heads=4, kv_heads=2, past=140))
    key = case.past_key.copy()
    key[0, 1, np.argmax(case.past_positions[0] >= 0)] = NAN
    mixed = from_half(run(replace(case, past_key=key))[0], kind).reshape(32, 2, -1)
    assert np.isnan(mixed[:, 1]).all() and np.isfinite(mixed[:, 0]).all()


@KINDS
def test_large_scores_do_not_overflow(kind):
    """exp of them would."""
    case = make_case(kind, Sizes(past=200), spread=300.0)
    mixed = from_half(run(case)[0], kind)
    assert np.isfinite(mixed).all() and np.abs(mixed).max() > 1


def test_positions_beyond_32_bits():
    """Up to 2³² − 3 blocks are told apart, later positions are one block."""
    case = make_case(FP16, Sizes(tokens=4, past=5, block_length=8))
    new, past = np.array([[2**31 + 7, 2**32 - 20, 2**40, 3]]), np.array([[2**31, 2**31 + 8, 2**32 - 24, 2**40, 0]])
    assert_right(case.with_positions(new, past))


@KINDS
@pytest.mark.parametrize("sizes", [
    Sizes(head_dim=32, rotary_dim=16, past=300, tokens=20),
    Sizes(head_dim=16, rotary_dim=16, heads=64, kv_heads=64, past=1, tokens=3),
    Sizes(head_dim=144, rotary_dim=16, past=140, tokens=9),
])
def test_same_bits_in_any_thread_order(kind, sizes):
    case, results = make_case(kind, sizes), set()
    for seed in (0, 1, 2, 1234567):  # see emulator.cpp: two ways to order threads
        library().dmoe_emulation_seed(seed)
        results.add(b"".join(x.tobytes() for x in run(case)))
    assert len(results) == 1


def _part(case: Case, rows: slice, tokens: slice) -> Case:
    """Some rows and some of their tokens."""
    s = case.sizes
    qkv = case.qkv.reshape(s.rows, s.tokens, -1)[rows, tokens]
    of_rows = {name: getattr(case, name)[rows] for name in ("past_positions", "past_key", "past_value")}
    of_tokens = {name: getattr(case, name)[rows, tokens] for name in ("cos", "sin", "position_ids")}
    size = replace(s, rows=qkv.shape[0], tokens=qkv.shape[1])
    return replace(case, sizes=size, qkv=qkv.reshape(size.rows * size.tokens, -1), **of_rows, **of_tokens)


def test_a_token_does_not_depend_on_its_company():
    """Alone in its batch, and with tokens it does not see behind it or without them: the same bits in every variant."""
    case = make_case(FP16, Sizes(4, 40, 260, 32, 32, 16, 16, block_length=20))
    together = run(case)[0].reshape(4, 40, -1)  # a thread block has 64 rows and all chunks
    for rows, tokens in (
        (slice(1, 2), slice(0, 40)),  # 64 rows and one chunk
        (slice(3, 4), slice(0, 20)),
        (slice(1, 3), slice(0, 20)),  # 32 rows and all chunks
    ):
        part = _part(case, rows, tokens)
        np.testing.assert_array_equal(run(part)[0].reshape(together[rows, tokens].shape), together[rows, tokens])


@KINDS
def test_free_places_behind_the_cache_do_not_matter(kind):
    """Up to 1024 places: the chunks are the same."""
    case = make_case(kind, Sizes(head_dim=32, rotary_dim=16, past=200, tokens=20))
    longer = make_case(kind, Sizes(head_dim=32, rotary_dim=16, past=900, tokens=20))
    past, key, value = longer.past_positions * 0 - 1, longer.past_key.copy(), longer.past_value.copy()
    past[:, :200], key[:, :, :200], value[:, :, :200] = case.past_positions, case.past_key, case.past_value
    longer = replace(case, sizes=longer.sizes, past_positions=past, past_key=key, past_value=value)
    np.testing.assert_array_equal(run(longer)[0], run(case)[0])


@KINDS
def test_weights_that_are_equal_keep_a_value(kind):
    """All values the same: the mixture of any number of them is that value, up to one rounding of weights each."""
    case = make_case(kind, Sizes(past=256, heads=2))
    value = np.full_like(case.past_value, case.past_value[0, 0, 0, 0])
    qkv = case.qkv.copy()
    qkv[:, -64:] = value[0, 0, 0, 0]
    mixed = from_half(run(replace(case, qkv=qkv, past_value=value))[0], kind)
    want = from_half(value, kind)[0, 0, 0, 0]
    np.testing.assert_allclose(mixed, want, rtol=2.01 * (2.0**-11 if kind == FP16 else 2.0**-8))


@pytest.mark.parametrize(("change", "code"), [
    ({"rows": -1}, -1), ({"tokens": -1}, -1), ({"past": 0}, -1), ({"heads": 3}, -1), ({"heads": 1}, -1),
    ({"kv_heads": 0}, -1), ({"head_dim": 4}, -1), ({"head_dim": 68}, -1), ({"head_dim": 272}, -1),
    ({"rotary_dim": 0}, -1), ({"rotary_dim": 7}, -1), ({"rotary_dim": 66}, -1),
    ({"rows": 1 << 20, "tokens": 1 << 12}, -1), ({"block_length": -1}, -2)])
def test_bad_shapes_are_refused(change, code):
    fields = {"kv_heads": 2, "heads": 4} | change
    shape = ctypes.byref(replace(Sizes(), **fields).c(FP16))
    assert library().dmoe_self_attention_workspace_bytes(shape) == code
    assert library().dmoe_self_attention(shape, *[None] * 14) == code


@pytest.mark.parametrize(("kind", "eps", "code"), [(2, 1e-6, -3), (-1, 1e-6, -3), (FP16, 0.0, -2), (FP16, np.nan, -2)])
def test_bad_types_and_attributes_are_refused(kind, eps, code):
    assert library().dmoe_self_attention(ctypes.byref(Sizes().c(kind, eps)), *[None] * 14) == code


def test_bad_pointers_are_refused():
    shape = ctypes.byref(Sizes(tokens=1, past=1).c(FP16))
    memory = Output((1 << 20,), np.uint8).array
    memory[...] = 0
    good = [pointer(memory)] * 7 + [None, None] + [pointer(memory[4096 * i:]) for i in (1, 2, 3, 4)]
    check(library().dmoe_self_attention(shape, *good, None))
    for place in (*range(7), *range(9, 13)):
        for wrong in (None, ctypes.c_void_p((good[place].value or 0) + 8)):
            arguments = [*good[:place], wrong, *good[place + 1:]]
            with pytest.raises(KernelError, match="null or not aligned"):
                check(library().dmoe_self_attention(shape, *arguments, None))
    one_norm = [*good[:7], good[0], None, *good[9:]]
    assert library().dmoe_self_attention(shape, *one_norm, None) == -4


@pytest.mark.parametrize("change", [{"rows": 0}, {"tokens": 0}])
def test_no_tokens_is_no_work(change):
    shape = ctypes.byref(replace(Sizes(), **change).c(FP16))
    assert library().dmoe_self_attention_workspace_bytes(shape) >= 0
    assert library().dmoe_self_attention(shape, *[None] * 14) == 0


def test_the_workspace_is_enough_for_smaller_shapes_and_bounded():
    """TensorRT asks for the largest shape of a profile only."""
    def size(rows, tokens, past):
        mini = Sizes(rows, tokens, past, 16, 4, 128, 64)
        return library().dmoe_self_attention_workspace_bytes(ctypes.byref(mini.c(BF16)))

    steps = [(1, 4, 17), (1, 32, 100, 255, 256, 480, 512), (1, 128, 2048, 2049, 8192, 100000)]
    for axis in range(3):
        for others in ((0, 0, 0), (1, 3, 2), (2, 6, 5)):
            sizes = [size(*(values[i] if a == axis else values[min(others[a], len(values) - 1)]
                            for a, values in enumerate(steps))) for i in range(len(steps[axis]))]
            assert sizes == sorted(sizes)
    assert size(1, 32, 8192) < 6e6 and size(1, 512, 8192) < 50e6
