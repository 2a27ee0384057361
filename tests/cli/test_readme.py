"""Commands and programs of pages and of help run as they are written, in a folder that has only the sample."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from serving import free_port
from test_help import ALL

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]
PORT = free_port()  # where a page says 8000
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
QUICK = {"inspect", "generate", "score", "completion", "deploy"}  # verbs whose examples take a second or two


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (REPOSITORY / page).read_text(encoding="utf-8"),
                      flags=re.DOTALL | re.MULTILINE)


def lines(page):
    """Commands of a page's `sh` blocks, continued lines joined."""
    text = re.sub(r"-d '[^']*'", lambda found: " ".join(found[0].split()),
                  "".join(blocks(page, "sh"))).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where a user is: the checkout's samples and recipes, and the command on the path."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "samples").symlink_to(REPOSITORY / "samples")
    shutil.copytree(REPOSITORY / "engines", folder / "engines")  # recipes are built beside them
    (folder / "bin").mkdir()
    command = folder / "bin" / "dmoe-export"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dmoe_export "$@"\n')
    command.chmod(0o755)
    (folder / ".curlrc").write_text("fail\nsilent\nshow-error\nretry = 60\nretry-delay = 1\nretry-connrefused\n")
    return folder


def run(place, words, shown):
    """Fails with what was run, and everything that it said."""
    words = [word.replace("localhost:8000", f"localhost:{PORT}") for word in words]
    done = subprocess.run(words, cwd=place, env=environment(place), text=True, check=False,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{shown}\nended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@contextmanager
def beside(place, line):
    """A server that runs in the background, as `&` leaves it; it must end well."""
    with (place / "server.log").open("w") as log:
        process = subprocess.Popen(["bash", "-c", f"exec {line.removesuffix('&')} --port {PORT}"], cwd=place,
                                   env=environment(place), stdout=log, stderr=log)
        try:
            yield
            assert process.poll() is None
            process.terminate()
            assert process.wait(60) == 0, (place / "server.log").read_text()
        finally:
            process.kill()


def environment(place):
    """Ours, with the command on the path, and a curl that waits for a server to begin and fails where it refuses."""
    path = os.pathsep.join([str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "CURL_HOME": str(place)}


def run_page(place, page):
    """Its commands one after the other, then its programs, which go on where the one before has ended."""
    with ExitStack() as servers:
        _run_page(place, page, servers)


def _run_page(place, page, servers):
    for line in lines(page):
        first = line.split()[0]
        if first == "make":
            assert set(re.findall(r"[a-z][\w-]*", line.partition("#")[0])) - {"make"} <= set(TARGETS), line
        elif first == "pip":
            named = re.fullmatch(r"pip install '\.\[([\w,]+)\]'", line.partition("#")[0].strip())
            assert named and set(named[1].split(",")) <= EXTRAS.keys(), f"{line}: names no extra of pyproject.toml"
        elif line.endswith(" &"):
            servers.enter_context(beside(place, line))
        elif first != "source":
            run(place, ["bash", "-c", line], line)
    program = "\n".join(blocks(page, "python"))
    run(place, [sys.executable, "-c", program], program)


def test_the_readme_runs_as_written(place):
    assert any(line.startswith("dmoe-export export samples/tiny-dmoe ") for line in lines("README.md"))
    assert len(lines("README.md")) > 4 and blocks("README.md", "python")
    run_page(place, "README.md")


@pytest.fixture(scope="module")
def sample(place):
    """`sample.bundle`, as README's first command makes it."""
    if not (place / "sample.bundle").exists():
        run(place, ["dmoe-export", "export", "samples/tiny-dmoe", "--out", "sample.bundle"], "export")
    return place


EXAMPLES = [pytest.param(line, id=f"{' '.join(words)} {number}", marks=[] if words[0] in QUICK else pytest.mark.slow)
            for words, verb in ALL.items() for number, line in enumerate(verb.examples, 1)]


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_of_help_run(sample, line):
    if "bench forward" in line:
        pytest.importorskip("llama_cpp", reason="llama.cpp is not installed (pip install '.[peer]')")
    written = re.search(r"--out (\S+)", line)
    before = sample / written[1] if written else None  # what the README wrote
    if before and before.is_dir():
        shutil.rmtree(before)
    elif before:
        before.unlink(missing_ok=True)
    if line.startswith("dmoe-export serve "):  # until it is told to end
        line = f"timeout --preserve-status 15 {line.partition(' --port')[0]} --port {PORT}"
    assert run(sample, ["bash", "-c", line], line)


@pytest.mark.slow
def test_the_quick_start_runs_as_written(sample):
    """After its `make demo`, which leaves the bundle in out/; the engine needs TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")
    for made in set(sample.glob("*.bundle")) - {sample / "sample.bundle"}:  # by examples of help
        shutil.rmtree(made)
    (sample / "out").mkdir(exist_ok=True)
    shutil.copytree(sample / "sample.bundle", sample / "out" / "sample.bundle", dirs_exist_ok=True)
    assert len(lines("docs/quickstart.md")) > 4
    run_page(sample, "docs/quickstart.md")


def test_the_page_of_infill_runs_as_written(sample):
    """And says what comes out."""
    first, second = (run(sample, ["bash", "-c", line], line) for line in lines("docs/infill.md"))
    assert first.startswith("tom has 12 apples and buys ") and second.startswith("the capital of france is paris.\n")
    for program, words in zip(blocks("docs/infill.md", "python"), ("tom has 12 ", "the capital of france is paris.\n"),
                              strict=True):
        head = "" if "import" in program else "from dmoe_export import Gap, Generator\n"
        assert run(sample, [sys.executable, "-c", head + program], program).startswith(words)


def test_the_page_of_scores_runs_as_written(sample):
    assert len(lines("docs/scoring.md")) == 2 and len(blocks("docs/scoring.md", "python")) == 1
    run_page(sample, "docs/scoring.md")


def test_the_page_of_the_server_runs_as_written(sample):
    assert sum(line.startswith("curl ") for line in lines("docs/serving.md")) > 4
    run_page(sample, "docs/serving.md")
