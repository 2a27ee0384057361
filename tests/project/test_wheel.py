"""What pip makes of these sources: wheels with the CPU kernels and without, installed outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from builds import ROOT
from conftest import SAMPLE

QUESTION = "tom has 12 apples and buys 7 more. how many apples does tom have?"
NO_KERNELS = ("-C", "wheel.cmake=false")


def _wheel(out: Path, *settings: str, source: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `pip wheel` with this environment's backend, CMake and Ninja: without a network."""
    pytest.importorskip("scikit_build_core")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source, *settings]
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(command, env={**os.environ, "PATH": paths, **environment}, capture_output=True, text=True,
                          check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources with what a working checkout has beside them: a bundle, a library."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("dmoe_export", "engines", "plugins"):
        skip = shutil.ignore_patterns("__pycache__", "lib", "*.bundle")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    for path in ("engines/mine.bundle/weights.bin", "dmoe_export/lib/libdmoe_cpu.so"):
        (copy / path).parent.mkdir()
        (copy / path).write_text("not for others")
    return copy


def test_the_wheel_without_kernels(source, tmp_path):
    """It is for every platform and carries data files and licences, but nothing that lies about in a checkout."""
    done = _wheel(tmp_path, *NO_KERNELS, source=source, CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith(".py")}
    patterns = ("py.typed", "check/templates/*", "serving/page/*", "recipes/*.toml")
    data = {path.relative_to(ROOT).as_posix() for pattern in patterns
            for path in (ROOT / "dmoe_export").glob(pattern) if path.is_file() and path.suffix != ".py"}
    assert len(data) >= 8 and data == {name for name in names if name.startswith("dmoe_export/")}
    licences = {name.partition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "THIRD_PARTY.md", "plugins/onnxruntime/include/LICENSE"}


@pytest.mark.slow
def test_a_wheel_carries_the_list_of_its_components(source, tmp_path):
    """`make sbom` makes the list; where PEP 770 wants it, and with what is compiled in."""
    (tmp_path / "list.json").write_text('{"components": [{"name": "numpy"}]}')
    subprocess.run([sys.executable, ROOT / "plugins" / "cmake" / "sbom.py", tmp_path / "list.json"], check=True)
    done = _wheel(tmp_path, "-C", f"cmake.define.DMOE_SBOM={tmp_path / 'list.json'}", source=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/sboms/" in name]
    listed = json.loads(zipfile.ZipFile(wheel).read(name))["components"]
    assert {one["name"] for one in listed} == {"numpy", "onnxruntime", "libstdc++"}


def test_without_a_compiler_one_sentence_says_what_to_do(source, tmp_path):
    done = _wheel(tmp_path, source=source, CXX="", PATH=str(Path(sys.executable).parent))
    said = " ".join(done.stdout.split() + done.stderr.split())
    assert done.returncode and not list(tmp_path.iterdir())
    assert ("There is no C++ compiler: install one (apt-get install g++), or leave the kernels out (pip install -C "
            "wheel.cmake=false).") in said


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "platform", "says"), [
    ((), sysconfig.get_platform().replace("-", "_"), "on our CPU kernels"),
    (NO_KERNELS, "any", "on ONNX Runtime's own ops")])
def test_a_wheel_alone_exports_and_answers(tmp_path, settings, platform, says):
    """In a fresh environment that sees the packages of this one, but neither this repository nor its installation."""
    done = _wheel(tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob(f"*-py3-none-{platform}.whl"))
    venv.create(tmp_path / "venv", with_pip=True)
    python, command = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin" / "dmoe-export"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        finished = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        return finished

    run(python, "-m", "pip", "install", "--no-index", "--ignore-installed", "--no-deps", wheel)
    run(python, "-m", "pip", "install", f"{wheel}[cpu,export]")  # the extras are here, in versions that do
    assert site.as_posix() in run(python, "-c", "import dmoe_export; print(dmoe_export.__file__)").stdout
    run(command, "export", SAMPLE, "--out", "b")
    assert "DmoeMixture" in run(command, "inspect", "b").stdout
    answer = run(command, "generate", "b", "--prompt", QUESTION, "--max-new-tokens", "32")
    assert answer.stdout.strip() == "12 + 7 = 19 apples" and says in answer.stderr
