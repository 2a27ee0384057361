"""The page's files: served as they lie, with no resource from elsewhere and no way for text to become HTML."""

from __future__ import annotations

import re

import pytest
from page_helpers import ask, house_of, served

from dmoe_export.serving import page

SCRIPTS = {name: path.read_text() for name, path in page.FILES.items() if name.endswith(".js")}


@pytest.fixture(scope="module")
def locked(sample_bundle):
    """A server that asks for a key."""
    with house_of(sample_bundle) as house, served(house, ["k"]) as url:
        yield url


def test_it_is_at_the_root_and_needs_no_key(locked):
    response = ask(f"{locked}/")
    assert response.status == 200 and "<title>dmoe-export</title>" in response.text
    assert response.headers["content-security-policy"].startswith("default-src 'self';")
    assert response.headers["x-content-type-options"] == "nosniff"


def test_every_file_it_names_is_served(locked):
    named = set(re.findall(r'(?:href|src)="(page/[^"]+)"', page.FILES["index.html"].read_text()))
    named |= {f"page/{name}" for text in SCRIPTS.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named == {f"page/{name}" for name in page.FILES if name != "index.html"}
    for name in named:
        response = ask(f"{locked}/{name}")
        assert response.status == 200 and "default-src 'self'" in response.headers["content-security-policy"]


@pytest.fixture(scope="module")
def open_to_all(sample_bundle):
    with house_of(sample_bundle) as house, served(house) as url:
        yield url


@pytest.mark.parametrize("path", ["/page/", "/page/__init__.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py",
                                  "/page/x.js"])
def test_nothing_else_is(open_to_all, path):
    assert ask(open_to_all + path).status == 404


def test_nothing_comes_from_elsewhere():
    for name, path in page.FILES.items():
        urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", path.read_text()))
        assert urls <= {"http://www.w3.org/2000/svg"}, name


def test_nothing_is_inline_that_the_policy_forbids():
    html = page.FILES["index.html"].read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", html)


def test_text_never_becomes_html():
    wrong = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|srcdoc")
    assert not [name for name, text in SCRIPTS.items() if wrong.search(text)]
