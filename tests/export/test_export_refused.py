"""Exports that cannot be finished: full disks, forbidden places, bad values and options; nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from dmoe_export import export_checkpoint
from dmoe_export.bundle.writer import DataFile
from dmoe_export.errors import CheckpointError, InputError, OutputError


def test_disk_full_leaves_nothing(tiny_checkpoint, tmp_path, monkeypatch):
    real, written = DataFile.write, 0

    def write(self, data):
        nonlocal written
        written += len(data)
        if written > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    monkeypatch.setattr(DataFile, "write", write)
    with pytest.raises(OutputError, match="No space left on device; nothing was left behind"):
        export_checkpoint(tiny_checkpoint, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before_the_work(tiny_checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"1\.0 kB free, the bundle needs \d+ kB;"):
        export_checkpoint(tiny_checkpoint, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def _run_export(checkpoint, out, before=""):
    code = (f"import os, resource\n{before}\nfrom dmoe_export.cli import main\n"
            f"main(['export', {str(checkpoint)!r}, '--out', {str(out)!r}])")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow  # a trace of its own, in another process
def test_file_size_limit_of_the_system(tiny_checkpoint, tmp_path):
    """A real refusal of the kernel in the middle of a file, not a simulated one."""
    result = _run_export(tiny_checkpoint, tmp_path / "b", "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))")
    assert result.returncode == 2, result.stderr
    assert "File too large; nothing was left behind" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up root's rights, so it must have them")
def test_no_write_permission_as_another_user(tiny_checkpoint, tmp_path):
    for parent in (tmp_path, *tmp_path.parents, tiny_checkpoint, *tiny_checkpoint.parents):
        if any("pytest" in part for part in parent.parts):
            parent.chmod(0o755)
    for file in tiny_checkpoint.iterdir():
        file.chmod(0o644)
    target = tmp_path / "locked"
    target.mkdir(mode=0o755)
    loaded = "import torch, dmoe_export.export.exporter, dmoe_export.cli.export\nos.setuid(65534)"
    result = _run_export(tiny_checkpoint, target / "b", loaded)
    assert result.returncode == 2, result.stderr
    assert "Permission denied; nothing was left behind" in result.stderr and "Traceback" not in result.stderr


def test_an_unreadable_file_of_the_checkpoint_is_blamed_itself(tiny_checkpoint, tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    (source / "LICENSE").write_text("x")
    monkeypatch.setattr("dmoe_export.export.licence.shutil.copyfile", refuse)
    with pytest.raises(PermissionError, match=r"LICENSE"):
        export_checkpoint(source, tmp_path / "b")
    assert list(tmp_path.iterdir()) == [source]


def test_target_below_a_file(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="could not be written"):
        export_checkpoint(tiny_checkpoint, tmp_path / "file" / "b")


def test_nan_in_a_router_leaves_nothing(tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file
    bad = tmp_path / "bad"
    shutil.copytree(tiny_checkpoint, bad)
    shard = next(bad.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.gate.weight"][0, 0] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight .*NaN"):
        export_checkpoint(bad, tmp_path / "new" / "folders" / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_values_beyond_half_precision_are_refused(tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file
    big = tmp_path / "big"
    shutil.copytree(tiny_checkpoint, big)
    shard = next(big.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.norm.weight"] = torch.full((32,), 1e6)
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match="beyond float16; use --precision bf16 or fp32"):
        export_checkpoint(big, tmp_path / "b", precision="fp16", compute="fp16")
    tensors["lm_head.weight"][3, 4] = 1e6
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight in .* beyond float16; use --head-precision bf16"):
        export_checkpoint(big, tmp_path / "b", precision="fp32", head_precision="fp16")


@pytest.mark.parametrize("threshold", [2.0, "high"])
def test_bad_core_threshold(tiny_checkpoint, tmp_path, threshold):
    bad = tmp_path / "bad"
    shutil.copytree(tiny_checkpoint, bad)
    config = json.loads((bad / "config.json").read_text()) | {"core_threshold": threshold}
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="core_threshold"):
        export_checkpoint(bad, tmp_path / "b")


def test_unknown_precision_and_routing(tiny_checkpoint, tmp_path):
    for options in ({"precision": "int3"}, {"routing": "best"}):
        with pytest.raises(InputError, match="is not known"):
            export_checkpoint(tiny_checkpoint, tmp_path / "b", **options)


@pytest.mark.parametrize(("option", "value"), [("block_length", 0), ("block_length", 257), ("top_p", 1.5),
                                               ("min_experts", 0), ("min_experts", 17), ("coreset_size", 99),
                                               ("layers", 0)])
def test_bad_options(tiny_checkpoint, tmp_path, option, value):
    with pytest.raises(CheckpointError, match=str(value)):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", **{option: value})
    assert not list(tmp_path.iterdir())


