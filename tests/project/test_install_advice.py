"""What messages and pages tell to install exists: requirements by name, this package from its checkout."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dmoe_export import extras

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PEERS = {"diffusers", "transformers"}  # only compared with; no part of this project's requirements
SOURCES = [path for folder in ("dmoe_export", "docs", "engines", "samples", "plugins", "benchmarks")
           for path in (REPOSITORY / folder).rglob("*") if path.suffix in (".py", ".md", ".sh", ".j2", ".txt")]
TEXTS = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
         for path in [REPOSITORY / "README.md", *SOURCES]}


def test_nothing_names_this_package_as_if_an_index_had_it():
    named = re.compile(r"dmoe-export\[|pip install (?:-\S+ )*['\"]?dmoe[-_]export\b(?!-|_)")
    assert len(TEXTS) > 200 and not [name for name, text in TEXTS.items() if named.search(text)]


def test_extras_and_packages_that_are_named_exist():
    brought = [*PROJECT["dependencies"], *(one for some in EXTRAS.values() for one in some)]
    known = {Requirement(one).name for one in brought} | PEERS
    for name, text in TEXTS.items():
        groups = re.findall(r"'\.\[([\w,]+)\]'", text)
        assert {one for group in groups for one in group.split(",")} <= EXTRAS.keys(), name
        packages = re.findall(r"pip install (?:-U )?'?([a-z][\w-]*)", text) if name.endswith(".py") else []
        assert set(packages) <= known, name


def test_extras_of_messages_exist():
    calls = [node for name, text in TEXTS.items() if name.startswith("dmoe_export/") and name.endswith(".py")
             for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    asked = {call.args[0].value for call in calls
             if getattr(call.func, "id", "") == "pip_install" and isinstance(call.args[0], ast.Constant)}
    assert len(asked) > 5 and asked <= EXTRAS.keys()


@pytest.mark.parametrize("extra", ["cpu", "gpu", "export", "hub", "rtx", "tensorrt", "check"])
def test_the_advice_is_the_requirements_of_the_extra(extra):
    wanted = [one for one in EXTRAS[extra] if not one.startswith("dmoe-export")]
    wanted = [*EXTRAS["export"], *wanted] if extra == "check" else wanted
    said = re.findall(r"'([^']+)'", extras.pip_install(extra))
    assert list(map(Requirement, said)) == list(map(Requirement, wanted))


def test_without_an_installation_the_checkout_is_named(monkeypatch):
    def missing(_):
        raise PackageNotFoundError("dmoe-export")

    monkeypatch.setattr(extras, "requires", missing)
    assert extras.pip_install("rtx") == "pip install '.[rtx]' in a checkout of dmoe-export"
