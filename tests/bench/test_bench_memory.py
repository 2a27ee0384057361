"""`bench export` and `bench build`: children are measured, their errors are ours; and the head of results."""

from __future__ import annotations

import sys

import pytest
from bench_helpers import bench, bench_json, check_head

from dmoe_export.bench import children
from dmoe_export.bench.record import Spread, Started
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.checkpoint.generated import GeneratedCheckpoint
from dmoe_export.errors import InputError


@pytest.mark.slow
def test_export_is_measured_and_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "_PROBE", 1 << 16)
    found = bench_json("export", "--geometry", "tiny", "--layers", 2, "--work", tmp_path, "--out", tmp_path / "e.json")
    check_head(found, "export")
    assert found["model"] == "tiny" and found["layers"] == 2 and found["generate_tokens"] == 60
    for part in ("export", "generate"):
        assert found[part]["seconds"] > 0.1
        assert 30e6 < found[part]["peak_anonymous_bytes"] <= found[part]["peak_rss_bytes"] < 4e9
    assert found["export"]["peak_rss_bytes"] > found["generate"]["peak_rss_bytes"]  # torch is in one of them
    assert found["limits"]["write_gb_per_s"] > 0 and found["checkpoint_bytes"] > 2 * 96 * 32 * 4
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_build_says_why_it_cannot(tmp_path, monkeypatch):
    """The child's sentence and exit code; what is built is tested with the builder."""
    monkeypatch.setattr(children, "watched_process", _no_export(children.watched_process))
    result = bench("build", "--geometry", "tiny", "--layers", 2, "--targets", "sm9", "--work", tmp_path)
    assert result.exit_code == 2
    assert "dmoe-export build failed with exit code 2: Target 'sm9' is no compute capability" in result.output


def test_a_child_without_a_command_line_says_the_same():
    with pytest.raises(InputError, match=r"it failed with exit code 2: --layers 9 is not between 2 .* and 2"):
        children.watched_process([sys.executable, "-c", children._WRITE, "nowhere", "tiny", "9", "float32"], "it")


def _no_export(watched):
    return lambda command, name: (None, "nowhere") if name == "Exporting the bundle" else watched(command, name)


def test_a_child_s_memory_and_time_are_its_own():
    held, text = children.watched_process([sys.executable, "-c", "import time; x = b'1' * (200 << 20); time.sleep(0.3);"
                                                          "print('{\"a\": 1}')"], "it")
    assert text == {"a": 1} and held.seconds > 0.3
    assert 200 << 20 < held.peak_anonymous_bytes <= held.peak_rss_bytes < 260 << 20
    with pytest.raises(InputError, match="it failed with exit code 2: it said nothing"):
        children.watched_process([sys.executable, "-c", "raise SystemExit(2)"], "it")


def test_written_checkpoint_is_the_generated_one(tmp_path):
    generated = GeneratedCheckpoint("tiny", 2, merged=False)
    generated.write(tmp_path)
    read = Checkpoint(tmp_path)
    assert read.description == generated.description
    assert set(read.reader.names) == set(generated.reader.names)
    for name in read.reader.names:
        assert read.reader.read(name).equal(generated.reader.read(name)), name
    assert not generated.reader.read("model.layers.1.mlp.experts.0.up_proj.weight").equal(
        generated.reader.read("model.layers.1.mlp.experts.1.up_proj.weight"))


def test_generated_parts_are_those_of_the_whole_tensor():
    reader = GeneratedCheckpoint("tiny", 2).reader
    shapes = [reader.read(name).shape == reader.shape(name) for name in reader.names]
    assert all(shapes)
    head = reader.read("lm_head.weight")
    assert head.unique(dim=0).shape == head.shape  # no two rows alike: argmax has no ties


def test_spread_of_one_and_of_many():
    assert Spread.of([3.0]) == Spread(median=3, least=3, lower=3, upper=3, count=1)
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(median=3, least=1, lower=2, upper=4, count=5)
    assert Spread.of([0.001, 0.002]).shown(1e3) == "1.5 (1.2–1.8)"


def test_published_commands_name_no_folders(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/dmoe-export", "bench", "step", "/home/me/a.bundle", "--out=/tmp/o/s.json",
                                      "--cached", "0,256"])
    command = Started("bench step").head.command
    assert command == "dmoe-export bench step a.bundle --out=s.json --cached 0,256"
