"""What of a run on a GPU machine needs none: steps and their records, what is carried, slimming, comparing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gpu  # puts the benchmarks on the path
import kernel_helpers
import pytest
import slim_onnxruntime as slim
from fake_cudart import HostDevice
from gpu_common import KernelLibrary

BENCHMARKS = Path(gpu.__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "device_run.sh"


def device_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"device_{name}", BENCHMARKS / "device" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load, compare, libraries = (device_script(name) for name in ("load", "compare", "libraries"))


class TestSteps:
    @pytest.fixture
    def steps(self, tmp_path):
        """Run lines of shell with the step function; what steps.json and the log then hold, and what was printed."""
        def run(lines: str, budget: int = 500):
            script = f'set -u -o pipefail; . {BENCHMARKS}/device/steps.sh; OUT={tmp_path}; PYTHON=true; {lines}\nfinish'
            done = subprocess.run(["bash", "-c", script], text=True, capture_output=True, check=False,
                                  env={**os.environ, "BUDGET": str(budget)})
            records = json.loads((tmp_path / "steps.json").read_text())
            return done, {entry["step"]: (entry["state"], entry["exit"]) for entry in records}

        return run

    def test_states(self, steps):
        done, states = steps("step fine 20 true; step bad 20 false; step lacks 20 sh -c 'exit 3'; step slow 1 sleep 30")
        assert states == {"fine": ("done", 0), "bad": ("failed", 1), "lacks": ("cannot run here", 3),
                          "slow": ("ran past 1 s", 124)}
        assert done.returncode == 1 and "3 of 4 steps" in done.stdout

    def test_all_done_is_exit_code_0(self, steps):
        assert steps("step fine 20 true")[0].returncode == 0

    def test_skipped_tests_prove_nothing(self, steps):
        done, states = steps("export PROOF='[0-9]+ passed'; step skipped 20 echo '12 skipped in 3 s'; "
                             "step passed 20 echo '3 passed, 9 skipped'")
        assert states == {"skipped": ("proved nothing", 0), "passed": ("done", 0)} and done.returncode == 1

    def test_no_time_left(self, steps):
        done, states = steps("step late 20 true", budget=10)
        assert states == {"late": ("no time left", -1)} and done.returncode == 1

    def test_the_log_has_everything_and_the_screen_the_end(self, steps, tmp_path):
        done, _ = steps("SHOWN=2 step many 20 seq 1 50")
        shown = done.stdout.splitlines()
        assert shown[0].startswith("== many, at most 20 s") and shown[1:3] == ["49", "50"]
        assert compare.outputs((tmp_path / "log.txt").read_text())["many"].split() == [str(i) for i in range(1, 51)]


class TestCalls:
    def test_every_step_is_expected_and_every_expected_step_is_there(self):
        """expected.txt and device_run.sh name the same steps."""
        text = SCRIPT.read_text()
        lists = {name: re.search(rf"^{name}=\(([^)]*)\)", text, re.MULTILINE)[1].split()  # type: ignore[index]
                 for name in ("FIRST", "ENGINES", "RTX")}
        before = re.findall(r"^    (?:SHOWN=\d+ )?step (\S+)", text[text.index("prepare() {"):], re.MULTILINE)
        assert before == ["facts", "wheels", "libraries", "custom-ops"]
        for call, steps in (("first", lists["FIRST"]), ("engines", lists["ENGINES"]), ("rtx", lists["RTX"])):
            assert [step.name for step in compare.expected(call)] == before + steps

    def test_calls_keep_the_tool_s_limits(self):
        calls = load.planned()
        assert [call.name for call in calls] == ["first", "engines", "keep-rtx", "rtx"]
        for call in calls:
            assert call.seconds <= 600 and len(call.command) <= 2000 and 1 <= len(call.carry) <= 8
            budget = re.search(r"BUDGET=(\d+)", call.command)
            assert budget is None or int(budget[1]) <= call.seconds - 40, "results must be written before it is killed"

    def test_the_runbook_has_the_calls(self):
        runbook = (BENCHMARKS / "gpu_runbook.md").read_text()
        for call in load.planned():
            assert call.command in runbook and " ".join(call.carry) in runbook, call.name

    def test_too_much_is_said(self, tmp_path, monkeypatch):
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        (tmp_path / "tracked").write_bytes(bytes(1000))
        (tmp_path / ".gitignore").write_text("/carried\n")
        (tmp_path / "carried").mkdir()
        (tmp_path / "carried" / "part").write_bytes(bytes(500))
        call = load.Call("one", 60, ("carried",), "true")
        monkeypatch.setattr(load, "LIMIT", 1509)
        assert load.report(tmp_path, [call])[1] is True
        monkeypatch.setattr(load, "LIMIT", 1508)
        lines, fits = load.report(tmp_path, [call])
        assert not fits and "1 bytes TOO MUCH" in lines[0]
        assert "NOT PACKED: gone" in load.report(tmp_path, [call._replace(carry=("gone",))])[0][0]

    def test_a_difference_is_said(self, tmp_path):
        expected = compare.expected("rtx")
        (tmp_path / "log.txt").write_text("".join(
            f"== {step.name}, at most 9 s: x\nthis is a rehearsal dmoe_export/lib: build 0123456789abcdef for compute "
            "capability 90 ONNX Runtime 1.30.0 takes tensorrt_rtx_bindings 1.7 No NVIDIA driver\n"
            for step in expected))

        def told(states: dict[str, str]) -> list[str]:
            entries = [{"step": name, "state": state, "seconds": 1} for name, state in states.items()]
            (tmp_path / "steps.json").write_text(json.dumps(entries))
            lines, wrong = compare.compare("rtx", tmp_path)
            said = [line for line in lines if "WRONG" in line]
            assert len(said) == wrong
            return said

        right = {step.name: step.state for step in expected}
        assert told(right) == []
        (line,) = told(right | {"wheels": "failed"})
        assert re.search(r"wheels +failed .*expected: done", line)
        (line,) = told(right | {"odd": "done"})
        assert "odd: nothing of it stands in expected.txt" in line
        (line,) = told({name: state for name, state in right.items() if name != "wheels"})
        assert re.search("wheels +not there", line)
        for i in range(8):
            (tmp_path / f"more{i}.json").touch()
        assert "10 files" in told(right)[0]
        log = tmp_path / "log.txt"
        log.write_text(log.read_text().replace("No NVIDIA driver", "ImportError"))
        assert "does not show: No NVIDIA driver" in told(right)[0]

    def test_usage(self):
        assert subprocess.run(["bash", SCRIPT, "nonsense"], capture_output=True, check=False).returncode == 2


def fat_binary(*containers: list[tuple[int, int, bytes]]) -> bytes:
    """An ELF file with nothing but .nv_fatbin; entries are kind, compute capability and code."""
    body = b""
    for entries in containers:
        inner = b"".join(struct.pack("<HHIQIIII32x", kind, 0x101, 64, len(code), 0, 0, 0, arch) + code
                         for kind, arch, code in entries)
        body += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(inner)) + inner
    names = b"\0.nv_fatbin\0.shstrtab\0"
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    table = 64 + len(body) + len(names)
    head += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64) + struct.pack("<IIQQQQ16x8x", 1, 1, 0, 0, 64, len(body)).ljust(64, b"\0")
    sections += struct.pack("<IIQQQQ16x8x", 12, 3, 0, 0, 64 + len(body), len(names)).ljust(64, b"\0")
    return head + body + names + sections


class TestSlimming:
    OLD, NEW, NEWEST = (2, 80, b"o" * 40), (2, 90, b"n" * 24), (2, 120, b"m" * 32)

    def test_one_generation_is_kept(self):
        data = bytearray(fat_binary([self.OLD, self.NEW, (1, 90, b"p" * 16), self.NEWEST], [self.NEWEST], [self.NEW]))
        size, before = len(data), slim.containers(data)
        said = slim.trim(data, 90)
        assert len(data) == size, "nothing may move"
        after = slim.containers(data)
        assert [at for at, *_ in after] == [at for at, *_ in before]
        assert [[code for *_, code in entries] for _, _, entries in after] == [[90], [120], [90]]
        (offset, length, *_), = after[0][2]
        assert data[offset + 64:offset + length] == self.NEW[2]
        assert (said["kept"], said["dropped"], said["left whole"], said["containers"]) == (2, 3, 1, 3)
        assert b"o" * 40 not in data and b"p" * 16 not in data
        slim.trim(data, 90)
        assert slim.containers(data) == after, "once more changes nothing"
        assert slim.listing(data) == "machine code by compute capability: 90 in 2, 120 in 1 of 3 containers"

    def test_kernels_that_no_graph_reaches_go(self):
        """Where all of a container's are; it then has machine code that this GPU does not take."""
        flash = b"\0.nv.constant0._ZN11onnxruntime5flash16flash_fwd_kernelE\0"
        other = b"\0.nv.constant0._ZN11onnxruntime4cuda7softmaxE\0"
        alone, mixed = flash.ljust(160, b"x"), (flash + other).ljust(160, b"x")
        newest = self.NEWEST
        data = bytearray(fat_binary([self.OLD, (2, 90, alone)], [(2, 90, mixed)], [newest]))
        size, before = len(data), slim.containers(data)
        said = slim.trim(data, 90)
        after = slim.containers(data)
        assert len(data) == size and [at for at, *_ in after] == [at for at, *_ in before]
        assert [[code for *_, code in entries] for _, _, entries in after] == [[120], [90], [120]]
        (offset, length, *_), = after[0][2]
        assert data[offset + 64:offset + length] == newest[2], "the smallest of others"
        assert (said["unreached"], said["kept"], said["left whole"]) == (1, 1, 1)
        assert alone not in data and mixed in data
        slim.trim(data, 90)
        assert slim.containers(data) == after, "once more changes nothing"

    def test_compressed_machine_code(self):
        """LZ4 is refused; what zstandard packed is read where zstandard is."""
        data = bytearray(fat_binary([self.NEW]))
        (offset, *_), = slim.containers(data)[0][2]
        struct.pack_into("<Q", data, offset + 40, 0x2000)
        with pytest.raises(slim.SlimError, match="LZ4"):
            slim.kernels(data, offset)
        if importlib.util.find_spec("zstandard") is None:
            struct.pack_into("<Q", data, offset + 40, 0x8000)
            with pytest.raises(slim.SlimError, match="zstandard is needed"):
                slim.kernels(data, offset)

    def test_what_is_not_understood_is_refused(self):
        whole = fat_binary([self.OLD, self.NEW])
        for broken, words in ((whole.replace(b".nv_fatbin", b".other_bin"), "no section"),
                              (whole.replace(struct.pack("<I", 0xBA55ED50), b"abcd"), "is not what this program knows"),
                              (b"MZ" + whole[2:], "no 64-bit"), (fat_binary([self.OLD]), "No container has")):
            with pytest.raises(slim.SlimError, match=words):
                slim.trim(bytearray(broken), 90)

    def test_files(self, tmp_path):
        capi = tmp_path / "onnxruntime" / "capi"
        for name in ("transformers/models", "capi"):
            (tmp_path / "onnxruntime" / name).mkdir(parents=True)
        for path in ("transformers/models/big.py", "capi/libonnxruntime.so.1.31.1", "capi/_pybind_state.py"):
            (tmp_path / "onnxruntime" / path).touch()
        (tmp_path / slim.PROVIDER).write_bytes(fat_binary([self.OLD, self.NEW]))

        def run(*arguments: str | Path):
            return subprocess.run([sys.executable, slim.__file__, *arguments], text=True, capture_output=True,
                                  check=False)

        done = run(tmp_path)
        assert done.returncode == 0 and "1 of 2 pieces of machine code kept" in done.stdout
        assert sorted(path.name for path in capi.iterdir()) == ["_pybind_state.py", "libonnxruntime_providers_cuda.so"]
        assert not (tmp_path / "onnxruntime" / "transformers").exists()
        assert run(tmp_path, "--list").stdout == "machine code by compute capability: 90 in 1 of 1 containers\n"
        refused = run(tmp_path / "onnxruntime")
        assert refused.returncode == 1 and "it is to be onnxruntime-gpu, unpacked" in refused.stderr


class TestLibraries:
    """Whether carried libraries are those of this tree; building them is rehearse.sh's."""

    @pytest.fixture
    def folder(self, tmp_path):
        sources = libraries.sources()
        (tmp_path / libraries.MADE_FROM).write_text(json.dumps({"code": 90, "build": "0" * 16, "sources": sources}))
        return tmp_path

    def test_sources_are_those_of_both_libraries(self):
        names = libraries.sources()
        for name in ("CMakeLists.txt", "kernels/experts.cu", "tensorrt/register.cpp", "onnxruntime/experts.cpp",
                     "onnxruntime/exports.map", "cmake/build_id.cmake"):
            assert name in names
        assert not any(name.startswith(("cpu/", "emulation/")) for name in names)

    def test_another_source_another_gpu_no_library(self, folder):
        path = folder / libraries.MADE_FROM
        made_from = json.loads(path.read_text())
        with pytest.raises(libraries.LibrariesError, match=r"libdmoe_plugins\.so cannot be used"):
            libraries.check(folder, 90)
        with pytest.raises(libraries.LibrariesError, match="for compute capability 90, not 80"):
            libraries.check(folder, 80)
        made_from["sources"]["kernels/experts.cu"] = "changed"
        path.write_text(json.dumps(made_from))
        with pytest.raises(libraries.LibrariesError, match=r"other sources: kernels/experts\.cu \(1 of"):
            libraries.check(folder, 90)
        path.unlink()
        with pytest.raises(libraries.LibrariesError, match="nobody knows"):
            libraries.check(folder, 90)


@pytest.mark.slow
def test_the_profiled_calls_run():
    """On the emulated kernels; with a GPU, ncu starts it."""
    target = device_script("ncu_target")
    device = HostDevice()
    library = KernelLibrary(Path(kernel_helpers.library()._name))
    assert target.main(device, library, (12, 2, 64, 32), 5, group=32) == 5
    assert not device.fake.blocks, "memory was not given back"
