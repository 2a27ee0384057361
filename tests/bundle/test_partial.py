"""What a killed export leaves: named and removed by the next one to the same place, and by no other."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dmoe_export.bundle import partial
from dmoe_export.bundle.partial import make_partial, unlock

KILLED = """
import os, sys, time
from dmoe_export.bundle.writer import BundleWriter
with BundleWriter(sys.argv[1]) as writer:
    writer.data_file("experts.bin").write(b"half of it")
    print(writer.folder, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def living(tmp_path):
    """A program that writes a bundle `b`, and the folder it writes to."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "b")], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    folder = Path(process.stdout.readline().strip())
    yield process, folder
    process.kill()
    process.wait()


def test_a_killed_one_s_folder_goes_and_a_living_one_s_stays(living, tmp_path, capsys):
    process, theirs = living
    mine, lock = make_partial(tmp_path / "b")
    assert theirs.is_dir() and not capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.wait()
    again, other = make_partial(tmp_path / "b")
    assert not theirs.exists() and mine.is_dir()
    assert capsys.readouterr().err == f"dmoe-export: {theirs}, left by a program that was killed, was removed.\n"
    for one in (lock, other):
        unlock(one)
    assert {mine, again} == set(tmp_path.iterdir())


def test_what_is_not_left_by_this_target_stays(tmp_path):
    """Other names, links, files; and a whole old bundle while there is no new one."""
    others = [tmp_path / name for name in (".b2.partial-x", ".a.partial-x", "b.partial-x", ".b.partial-y.old")]
    for folder in others:
        folder.mkdir()
    (tmp_path / ".b.partial-file").write_text("")
    (tmp_path / ".b.partial-link").symlink_to(others[0])
    before = set(tmp_path.iterdir())
    folder, lock = make_partial(tmp_path / "b")
    unlock(lock)
    assert set(tmp_path.iterdir()) == before | {folder}
    (tmp_path / "b").mkdir()  # there is a new one: its old one is of no use
    _, lock = make_partial(tmp_path / "b")
    unlock(lock)
    assert not others[3].exists() and not folder.exists() and others[0].exists()


def test_another_user_s_stays(tmp_path, monkeypatch):
    (tmp_path / ".b.partial-x").mkdir()
    monkeypatch.setattr(partial.os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    _, lock = make_partial(tmp_path / "b")
    unlock(lock)
    assert (tmp_path / ".b.partial-x").exists()


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    (tmp_path / ".b.partial-x").mkdir()
    monkeypatch.setattr(partial, "fcntl", None)
    make_partial(tmp_path / "b")
    assert (tmp_path / ".b.partial-x").exists()


def test_two_programs_at_once_do_not_take_each_other_s(tmp_path):
    """Each makes and leaves folders while the other cleans up; nobody's own is ever gone."""
    code = """
import sys, time
from pathlib import Path
from dmoe_export.bundle.partial import make_partial, unlock
end = time.monotonic() + 1
while time.monotonic() < end:
    folder, lock = make_partial(Path(sys.argv[1]))
    (folder / "f").write_text("x")
    time.sleep(0.002)
    assert (folder / "f").read_text() == "x"
    unlock(lock)
"""
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "b")], stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    wrong = [one.communicate(timeout=60)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], wrong
