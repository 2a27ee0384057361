"""Salient steps from a bundle to an answer, on ONNX Runtime and from the command line."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from cpu_ops_helpers import built

from dmoe_export import Generator, export_checkpoint
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.cli import main
from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.errors import RequestError
from dmoe_export.model.backend import EagerBackend
from dmoe_export.model.load import load_denoiser
from dmoe_export.runtime.cpu import library

PROMPTS = [[5, 6, 7, 1, 9, 2, 4, 4, 3, 8], [9, 9, 4]]
COMMON = {"max_new_tokens": 24, "eos_id": -1, "steps": 6}


@pytest.fixture(scope="module")
def llada(salient_llada) -> Generator:
    return Generator.open(salient_llada.folder, backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def block(salient_block) -> Generator:
    return Generator.open(salient_block.folder, backend="onnxruntime", threads=1)


def tokens(generator: Generator, **options) -> list[list[int]]:
    return [answer.token_ids for answer in generator.generate(PROMPTS, **(COMMON | options))]


def test_block_oracle_is_the_plain_result(block):
    """Threshold above 1 with exact layer 0: token for token the plain block result, also under another routing."""
    for routing in ({}, {"coreset_top_p": 0.3}):
        assert tokens(block, salient_threshold=1.5, exact_first_layer=True, **routing) == tokens(block, **routing)


def test_full_canvas_oracle_is_the_uncached_result(llada):
    assert tokens(llada, salient_threshold=1.5, refresh_interval=1) == tokens(llada, cache="none")


@pytest.mark.parametrize("options", [{}, {"salient_capacity": 8}, {"temperature": 0.8, "seed": 3},
                                     {"acceptance": "hierarchy", "threshold": 0.3}])
def test_the_same_as_the_eager_loop(llada, salient_llada, synthetic, options):
    """State, schedule and graphs together, for two prompts in different phases."""
    options = {"salient_threshold": 0.98, "full_steps": 2, **COMMON, **options}
    model = load_denoiser(Checkpoint(synthetic("llada-tiny")), salient_llada.manifest.routing)
    want: list[list[int]] = [[], []]
    steps = {}
    for part in BlockDiffusion(EagerBackend(model), DecodeSettings(**options)).decode(PROMPTS):
        want[part.index] += part.token_ids
        steps[part.index] = part.statistics.salient_by_step
    answers = llada.generate(PROMPTS, **options)
    assert [a.token_ids for a in answers] == want
    assert [a.stats.salient_by_step for a in answers] == [steps[0], steps[1]]
    assert [llada.generate([p], **options | {"seed": options.get("seed", 0) + i})[0].token_ids
            for i, p in enumerate(PROMPTS)] == want


def test_more_rows_than_the_capacity_become_a_dense_step(llada):
    """Above 1 every row is salient, so no step fits 8 rows: each is repeated densely: the exact oracle."""
    answers = llada.generate(PROMPTS, **COMMON, salient_threshold=1.5, salient_capacity=8)
    assert [answer.token_ids for answer in answers] == tokens(llada, salient_threshold=1.5, exact_first_layer=True)
    assert all(answer.stats.salient_overflows > 0 for answer in answers)


@pytest.mark.parametrize("budget", ["100%", "50%", "25%"])
def test_under_an_expert_budget(block, salient_block, budget, monkeypatch):
    """The same tokens; the policy counts a step of several rows once, and the budget is kept."""
    monkeypatch.setattr(library, "INSTALLED", built())
    under = Generator.open(salient_block.folder, backend="onnxruntime", threads=1, expert_budget=budget,
                           expert_refresh_interval=2)
    options = COMMON | {"salient_threshold": 0.9}
    plain, answers = block.generate(PROMPTS, **options), under.generate(PROMPTS, **options)
    assert [a.token_ids for a in answers] == [a.token_ids for a in plain]
    assert [a.stats.salient_by_step for a in answers] == [a.stats.salient_by_step for a in plain]
    residency = answers[-1].stats.residency
    assert residency["hits"] > 0 and residency["peak_bytes"] <= residency["budget_bytes"]
    assert residency["misses"] > 0 and (residency["dropped_bytes"] > 0) == (budget != "100%")
    assert under.backend._residency.steps < sum(a.stats.forwards_by_phase["denoise"] for a in answers)
    under.backend.close()


def test_fewer_experts_are_used(block):
    plain = block.generate(PROMPTS[:1], **COMMON)[0].stats
    sparse = block.generate(PROMPTS[:1], salient_threshold=0.9, **COMMON)[0].stats
    assert sparse.salient_rows < 32 and sparse.unique_experts < plain.unique_experts
    assert sparse.expert_bytes_touched < plain.expert_bytes_touched


def test_streaming(llada):
    parts = list(llada.stream([PROMPTS[0]], salient_threshold=0.98, **COMMON))
    assert [i for part in parts for i in part.token_ids] == tokens(llada, salient_threshold=0.98)[0]
    assert len(parts) == 3


def test_command_line(salient_llada):
    arguments = ["generate", str(salient_llada.folder), "--prompt-ids", "5,6,7", "--max-new-tokens", "16",
                 "--steps", "4", "--eos-id", "-1", "--salient-threshold", "0.95", "--full-steps", "1",
                 "--refresh-interval", "4", "--salient-capacity", "8", "--backend", "onnxruntime"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    stats = json.loads(result.stdout)["stats"]
    assert len(stats["salient_by_step"][0]) == 2 and stats["salient_rows"] > 0
    assert "salient rows per layer" in CliRunner().invoke(main, arguments).stderr
    wrong = CliRunner().invoke(main, [*arguments, "--cache", "dual"])
    assert wrong.exit_code == 2 and "exclude each other" in wrong.stderr


def test_refused(llada, tiny_bundle):
    with pytest.raises(RequestError, match="no salient graph for capacity 16, it has graphs for 8"):
        tokens(llada, salient_threshold=0.9, salient_capacity=16)
    plain = Generator.open(tiny_bundle.folder, backend="onnxruntime")
    with pytest.raises(RequestError, match="has no salient graph; export it with --salient"):
        tokens(plain, salient_threshold=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("precision, dense", [("fp16", "fp16"), ("int8", "fp16"), ("int4", None),
                                                              ("bf16", None)])
def test_under_an_expert_budget_in_every_format(precision, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "INSTALLED", built())
    config = {"hidden_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    write_synthetic(tmp_path / "checkpoint", GEOMETRIES["tiny"] | config)
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", precision=precision,
                               dense_precision=dense, salient=True, compute=dense or "fp32")
    options = {"salient_threshold": 0.99, "full_steps": 1}
    whole, half = (Generator.open(bundle.folder, backend="onnxruntime", threads=1, verify="sizes", expert_budget=budget)
                   for budget in (None, "50%"))
    assert tokens(half, **options) == tokens(whole, **options)
    residency = half.generate(PROMPTS, **(COMMON | options))[0].stats.residency
    assert residency["misses"] > 0 and residency["peak_bytes"] <= residency["budget_bytes"]
