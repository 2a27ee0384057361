"""What a process may use, from files of a made-up system."""

from __future__ import annotations

import pytest

from dmoe_export.fit.room import has_gpu, process_memory
from dmoe_export.runtime.residency.budget import machine_memory

GIB = 1 << 30


def _system(root, available=None, own=0, groups="", limits=None):
    files = {"proc/self/status": f"Name:\tpython\nRssAnon:\t{own // 1024} kB\n", "proc/self/cgroup": groups}
    if available is not None:
        files["proc/meminfo"] = f"MemTotal:  99999999 kB\nMemAvailable:   {available // 1024} kB\n"
    for name, text in {**files, **(limits or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_a_limit_it_is_what_is_available_and_what_the_process_has(tmp_path):
    assert process_memory(_system(tmp_path, 3 * GIB, own=GIB)) == 4 * GIB


@pytest.mark.parametrize("limit, expected", [(f"{2 * GIB}\n", 2 * GIB), ("max\n", 3 * GIB), (f"{9 * GIB}\n", 3 * GIB)])
def test_a_control_group_of_version_2(tmp_path, limit, expected):
    root = _system(tmp_path, 3 * GIB, groups="0::/a/b\n", limits={"sys/fs/cgroup/a/b/memory.max": limit})
    assert process_memory(root) == expected


def test_a_group_above_may_be_the_tighter_one(tmp_path):
    limits = {"sys/fs/cgroup/a/memory.max": str(GIB), "sys/fs/cgroup/a/b/memory.max": str(2 * GIB)}
    assert process_memory(_system(tmp_path, 3 * GIB, groups="0::/a/b\n", limits=limits)) == GIB


def test_in_a_container_the_group_is_the_root(tmp_path):
    """There, the path is that of the host, and the files lie at the top."""
    root = _system(tmp_path, 3 * GIB, groups="0::/../../x\n", limits={"sys/fs/cgroup/memory.max": str(GIB)})
    assert process_memory(root) == GIB


@pytest.mark.parametrize("limit, expected", [(GIB, GIB), (9223372036854771712, 3 * GIB)])
def test_a_control_group_of_version_1(tmp_path, limit, expected):
    root = _system(tmp_path, 3 * GIB, groups="5:cpu,cpuacct:/x\n4:memory:/x\n",
                   limits={"sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{limit}\n"})
    assert process_memory(root) == expected


def test_a_system_that_tells_nothing_has_its_physical_memory(tmp_path):
    assert process_memory(tmp_path) == machine_memory()


@pytest.mark.parametrize("text", ["MemAvailable: lots kB\n", "MemAvailable:\n", "\x00\xff\n"])
def test_files_of_another_form_are_no_figures(tmp_path, text):
    root = _system(tmp_path)
    (root / "proc/meminfo").write_text(text)
    assert process_memory(root) == machine_memory()


def test_a_gpu_is_known_by_its_driver(tmp_path):
    assert not has_gpu(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert has_gpu(tmp_path)
