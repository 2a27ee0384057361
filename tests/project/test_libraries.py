"""Where the compiled libraries are looked for."""

from __future__ import annotations

from dmoe_export import libraries


def test_the_first_folder_that_has_it(tmp_path, monkeypatch):
    """As in an editable installation: the sources here, what pip compiled there."""
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(libraries, "__file__", str(here / "libraries.py"))
    monkeypatch.setattr(libraries, "_installed", [str(there), str(here)])
    assert libraries.library("x.so") == here / "lib" / "x.so"
    for folder in (there, here):
        (folder / "lib").mkdir(parents=True)
        (folder / "lib" / "x.so").touch()
        assert libraries.library("x.so") == folder / "lib" / "x.so"
    assert not libraries.library("other.so").exists()
