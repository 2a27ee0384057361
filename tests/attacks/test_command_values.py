"""Values of the command line that once hung, took the machine's memory, or were read as another number."""

from __future__ import annotations

import os

import numpy as np
import pytest
from click.testing import CliRunner

from dmoe_export import Generator, RequestError
from dmoe_export.cli import main
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.guards.numerals import integer, real

GENERATE = ("generate", "BUNDLE", "--prompt-ids", "5,6", "--max-new-tokens", "4")


def run(bundle, *words):
    return CliRunner().invoke(main, [str(bundle) if word == "BUNDLE" else word for word in words])


@pytest.fixture(scope="module")
def right(tiny_bundle):
    return run(tiny_bundle.folder, *GENERATE).stdout


@pytest.mark.parametrize(("option", "value"), [
    ("--steps", 2**31), ("--steps", 10**30), ("--edit-passes", 1000), ("--seed", 10**30), ("--top-k", 10**30),
    ("--temperature", 5e-324)])
def test_large_numbers_are_as_quick_as_small_ones(tiny_bundle, right, option, value):
    found = run(tiny_bundle.folder, *GENERATE, option, str(value))
    assert found.exit_code == 0 and found.stdout == right


@pytest.mark.parametrize("words", [
    (*GENERATE[:4], "--max-new-tokens", 2**31), (*GENERATE, "--edit-passes", 10**12), (*GENERATE, "--eos-id", 10**20),
    (*GENERATE, "--block-length", 2**40), (*GENERATE, "--min-experts", 10**30), (*GENERATE, "--threads", 1000),
    (*GENERATE, "--threads", 10**30), (*GENERATE, "--experts-per-layer", 10**30),
    (*GENERATE, "--expert-budget", 10**400), (*GENERATE, "--expert-refresh-interval", "9" * 5000),
    ("bench", "decode", "BUNDLE", "--rounds", 10**9), ("bench", "decode", "BUNDLE", "--random-prompt", 10**9),
    ("bench", "step", "BUNDLE", "--repeats", 10**9), ("bench", "step", "BUNDLE", "--tokens", 10**9),
    ("bench", "step", "BUNDLE", "--active-experts", 10**9), ("bench", "step", "BUNDLE", "--threads", 1000),
    ("bench", "generate", "BUNDLE", "--prompt-tokens", 2**31), ("bench", "residency", "BUNDLE", "--turns", 10**9),
    ("export", "nowhere", "--out", "x", "--layers", 10**9), ("build", "BUNDLE", "--recipe", ""),
    ("check", "BUNDLE", "--recipe", "")], ids=lambda words: " ".join(map(str, words))[:60])
def test_numbers_without_reason_are_refused(tiny_bundle, words):
    found = run(tiny_bundle.folder, *map(str, words))
    assert found.exit_code == 2 and "unexpected" not in found.stderr and found.stderr.count("\n") == 1, found.stderr


@pytest.mark.parametrize("words", [
    (*GENERATE, "--steps", "４"), (*GENERATE, "--steps", "1_0"), (*GENERATE, "--threshold", "٠.٩"),
    (*GENERATE, "--eos-id", "١"), (*GENERATE[:2], "--prompt-ids", "١,٢"), (*GENERATE, "--expert-budget", "４G"),
    (*GENERATE, "--expert-refresh-interval", "３"), ("bench", "step", "BUNDLE", "--cached", "٣"),
    ("bench", "decode", "BUNDLE", "--acceptance", "threshold:٠.٩"), ("bench", "residency", "BUNDLE", "--budget", "٣%"),
    ("bench", "residency", "BUNDLE", "--routing", "top_p:٠.٤"), ("build", "BUNDLE", "--dry-run", "--targets", "sm８０"),
    ("build", "BUNDLE", "--dry-run", "--workspace", "４G")], ids=lambda words: " ".join(words)[-30:])
def test_digits_of_other_scripts_are_no_numbers(tiny_bundle, words):
    if words[0] == "build":
        pytest.importorskip("tensorrt_rtx")
    found = run(tiny_bundle.folder, *words)
    assert found.exit_code == 2 and "unexpected" not in found.stderr and found.stderr.count("\n") == 1, found.stderr


def test_what_is_a_number():
    assert [integer(text) for text in ("5", " -7 ", "+3")] == [5, -7, 3]
    assert [real(text) for text in ("0.5", "1e-3", "7", ".5")] == [0.5, 1e-3, 7, 0.5]
    for text in ("", "٣", "1_0", "0x1", "9" * 201, "nan"):
        for kind in (integer, real):
            with pytest.raises(ValueError):
                kind(text)


def test_a_prompt_file_is_a_file_and_bounded(tiny_bundle, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", tmp_path / "fifo", tmp_path):
        found = run(tiny_bundle.folder, "generate", "BUNDLE", "--prompt-file", str(path))
        assert found.exit_code == 2 and "cannot be read as text: " in found.stderr


def test_a_folder_as_the_place_of_a_file_leaves_nothing_beside_it(tiny_bundle, tmp_path):
    (tmp_path / "out").mkdir()
    found = run(tiny_bundle.folder, "bench", "decode", "BUNDLE", "--random-prompt", "3", "--max-new-tokens", "2",
                "--rounds", "1", "--cache", "block", "--out", str(tmp_path / "out"))
    assert found.exit_code == 2 and "cannot be written" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_list_of_what_is_compared(tiny_bundle):
    found = run(tiny_bundle.folder, "bench", "decode", "BUNDLE", "--random-prompt", "3", "--salient=")
    assert found.exit_code == 2 and found.stderr == (
        "dmoe-export: The list '' of what is compared is empty; give values separated by commas.\n")


@pytest.mark.parametrize("options", [{"verify": np.array([[1, 2]])}, {"backend": np.array([1, 2])},
                                     {"cpu_products": np.array([1, 2])}])
def test_arrays_are_no_words(tiny_bundle, options):
    with pytest.raises(RequestError, match=next(iter(options)).replace("backend", "Backend")):
        Generator.open(tiny_bundle.folder, **options)


def test_an_array_is_no_name_of_a_setting():
    with pytest.raises(RequestError, match="cache is"):
        DecodeSettings(cache=np.array([1, 2]))
