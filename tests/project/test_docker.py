"""The Dockerfile and its steps, as far as they can be tried without Docker."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
INSTALL = REPOSITORY / "samples" / "deploy" / "install.sh"


def _instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", (REPOSITORY / "Dockerfile").read_text())
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(line[0], line[1]) for line in lines]


def test_the_final_stage_is_unprivileged_and_starts_the_command():
    stages = [i for i, (name, _) in enumerate(_instructions()) if name == "FROM"]
    final = dict(_instructions()[stages[-1]:])
    assert len(stages) == 2 and final["ENTRYPOINT"] == '["dmoe-export"]'
    assert final["USER"].isdigit() and int(final["USER"]) >= 1000
    created = next(text for name, text in _instructions() if name == "RUN" and "useradd" in text)
    assert f"--uid {final['USER']} " in created
    assert final["WORKDIR"] in created  # it exists and belongs to that user


def test_the_image_fits_the_package():
    """The tag says nothing of its TensorRT, so the page does; both name one image."""
    image = dict(_instructions())["ARG"]
    first = next(text for name, text in _instructions() if name == "ARG")
    assert re.fullmatch(r"TENSORRT_IMAGE=nvcr\.io/nvidia/tensorrt:\d\d\.\d\d-py3", first), image
    assert f"`{first.partition('=')[2]}`" in (REPOSITORY / "docs" / "container.md").read_text()


def test_the_build_context_has_what_the_steps_need():
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    needed = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "dmoe_export", "plugins"}
    assert needed <= set(allowed) and INSTALL.relative_to(REPOSITORY).as_posix() in allowed
    for path in allowed:
        assert list(REPOSITORY.glob(path)), path
    run = next(text for name, text in _instructions() if name == "RUN" and "install.sh" in text)
    for option in re.findall(r"--[a-z-]+", run):
        assert f" {option} " in INSTALL.read_text()


def _install(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([INSTALL, *arguments], capture_output=True, text=True, timeout=60)


def test_dry_run_shows_the_steps_and_does_nothing(tmp_path):
    done = _install("--venv", str(tmp_path / "v"), "--extras", "tensorrt,export,cpu", "--system-packages", "--code",
                    "80,90", "--dry-run")
    assert done.returncode == 0, done.stderr
    commands = [line.strip() for line in done.stdout.splitlines() if line.startswith("    ")]
    assert commands[1:4] == [
        f"python3 -m venv --system-site-packages {tmp_path}/v",
        f"{tmp_path}/v/bin/python -m pip install --quiet --upgrade pip",
        f"{tmp_path}/v/bin/python -m pip install --no-cache-dir --constraint constraints.txt "
        "-C cmake.define.DMOE_CUDA=ON -C cmake.define.DMOE_FETCH=ON -C cmake.define.DMOE_CUDA_CODE=80;90 "
        ".[tensorrt,export,cpu]"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--extra", "rtx"], "Option --extra is not known"), (["--venv"], "--venv needs a value")])
def test_bad_options(arguments, sentence):
    done = _install(*arguments)
    assert done.returncode == 2 and sentence in done.stderr and not done.stdout


def test_a_machine_that_lacks_something_is_told_what(tmp_path):
    """A path with the interpreter but without a compiler."""
    for tool in ("bash", "dirname", "env", "realpath"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    (tmp_path / "python3").symlink_to(sys.executable)
    done = subprocess.run([INSTALL, "--venv", tmp_path / "v"], capture_output=True, text=True, timeout=60,
                          env={"PATH": str(tmp_path)})
    assert done.returncode == 3 and "There is no C++ compiler" in done.stderr and not (tmp_path / "v").exists()


@pytest.mark.parametrize(("tool", "file"), [("hadolint", "Dockerfile"), ("shellcheck", "samples/deploy/install.sh")])
def test_linters_pass(tool, file):
    found = shutil.which(tool, path=str(Path(sys.executable).parent))
    if not found:
        pytest.skip(f"{tool} is not installed (pip install '.[dev]')")
    done = subprocess.run([found, file], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
