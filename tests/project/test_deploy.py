"""samples/deploy: a bundle goes to a device (a local folder), is verified and answers there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmoe_export.cli import main

DEPLOY = Path(__file__).parents[2] / "samples" / "deploy"
TOOLS = ["bash", "sh", "basename", "mkdir", "tar", "rm", "mv", "test", "env"]


@pytest.fixture(params=["tar", "rsync", "tar over ssh", "rsync over ssh"])
def device(request, tmp_path):
    """DEVICE of deploy.sh: a local folder, directly or behind an ssh that stays on this machine."""
    tools = tmp_path / "bin"
    tools.mkdir()
    wanted = [*TOOLS, "rsync"] if request.param.startswith("rsync") else TOOLS
    if not all(shutil.which(tool) for tool in wanted):
        pytest.skip("rsync is not installed here")
    for tool in wanted:
        (tools / tool).symlink_to(shutil.which(tool))
    _script(tools / "dmoe", f'exec {sys.executable} -m dmoe_export "$@"')
    if "ssh" not in request.param:
        return str(tmp_path / "the device")
    _script(tools / "ssh", f'[ "$1" = device ] || exit 255; shift; cd "{tmp_path}" && exec sh -c "$*"')
    return "device:the device"


def _script(path: Path, line: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{line}\n")
    path.chmod(0o755)


def _deploy(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run deploy.sh with few tools on the path, and dmoe-export of this checkout as the device's command."""
    environment = os.environ | {"PATH": str(tmp_path / "bin"), "DMOE": str(tmp_path / "bin" / "dmoe"),
                                "PYTHONPATH": str(DEPLOY.parents[1])}
    return subprocess.run(["bash", DEPLOY / "deploy.sh", *arguments], env=environment, capture_output=True, text=True,
                          timeout=120)


def test_copy_verify_run(device, sample_bundle, tmp_path):
    done = _deploy(tmp_path, sample_bundle.folder, device, "what is 2 plus 3?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("2 + 3 = 5")
    there, name = tmp_path / "the device", sample_bundle.folder.name
    assert [p.name for p in there.iterdir()] == [name]
    for file in sample_bundle.folder.iterdir():
        assert (there / name / file.name).read_bytes() == file.read_bytes()

    # A damaged bundle does not take the good one's place, and leaves nothing behind.
    damaged = shutil.copytree(sample_bundle.folder, tmp_path / name)
    with (damaged / "experts.bin").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    before = (there / name / "experts.bin").read_bytes()
    again = _deploy(tmp_path, damaged, device)
    assert again.returncode == 2 and "experts.bin" in again.stderr and "the copy is not in place" in again.stderr
    assert [p.name for p in there.iterdir()] == [name] and (there / name / "experts.bin").read_bytes() == before

    # A good one replaces it, with all that was in it.
    (there / name / "left.over").touch()
    assert _deploy(tmp_path, sample_bundle.folder, device).returncode == 0
    assert [p.name for p in there.iterdir()] == [name] and not (there / name / "left.over").exists()


def test_what_is_no_bundle_is_refused(tmp_path):
    done = subprocess.run([DEPLOY / "deploy.sh", tmp_path, tmp_path / "d"], capture_output=True, text=True)
    assert done.returncode == 2 and "has no manifest.json" in done.stderr and not (tmp_path / "d").exists()
    assert subprocess.run([DEPLOY / "deploy.sh", tmp_path], capture_output=True).returncode == 2


def _ask(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, DEPLOY / "ask.py", *arguments], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(DEPLOY.parents[1])})


def test_the_program_answers(sample_bundle, tmp_path):
    done = _ask(sample_bundle.folder, "what is the capital of france?")
    assert done.returncode == 0 and done.stdout == "the capital of france is paris.\n", done.stderr
    assert "onnxruntime" in done.stderr and "forwards" in done.stderr
    wrong = _ask(tmp_path, "x")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and str(tmp_path) in wrong.stderr


def test_the_systemd_unit_starts_a_server_and_gives_it_time_to_drain(tmp_path):
    unit = (DEPLOY / "dmoe-export.service").read_text()
    said = dict(re.findall(r"^(\w+)=(.*)$", unit, flags=re.MULTILINE))
    program, verb, *words = said["ExecStart"].split()
    options = {name for param in main.get_command(None, verb).params for name in param.opts}
    assert program.endswith("/dmoe-export") and {word for word in words if word.startswith("--")} <= options
    assert int(said["TimeoutStopSec"]) > int(words[words.index("--drain-seconds") + 1]) + 5
    if shutil.which("systemd-analyze"):
        (tmp_path / "dmoe-export.service").write_text(unit.replace(program, "/bin/true"))
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", tmp_path / "dmoe-export.service"],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "dmoe-export.service" not in done.stderr, done.stderr
