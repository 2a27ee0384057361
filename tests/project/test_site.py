"""The documentation site builds, loads nothing from elsewhere, and its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

REPOSITORY = Path(__file__).parents[2]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page loads, where it leads, and which places others can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded, self.leads, self.places = [], [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        said = dict(attrs)
        self.places |= {said.get("id"), said.get("name")}
        if address := said.get(LOADED.get(tag, "")):
            self.loaded.append(address)
        if tag == "a" and said.get("href"):
            self.leads.append(said["href"])


def _build(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out], cwd=folder,
                          env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = _build(REPOSITORY, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site, pages):
    for page in (REPOSITORY / "docs").rglob("*.md"):
        name = page.relative_to(REPOSITORY / "docs").with_suffix(".html").as_posix()
        assert (site / name.replace("README", "index")).is_file()
    assert (site / "engines" / "index.html").is_file() and (site / "index.html").is_file()
    elsewhere = {address for page in pages.values() for address in page.loaded if re.match(r"[a-z]+:|//", address)}
    assert {address for address in elsewhere if not address.startswith("data:")} == set()
    styles = "".join(style.read_text(encoding="utf-8") for style in site.rglob("*.css"))
    assert styles and not re.search(r"(@import|url\()[\"' ]*https?:", styles)


def test_links_lead_to_files_and_places_that_exist(site, pages):
    broken, inside = [], 0
    for path, page in pages.items():
        if path.name == "404.html":  # its addresses are those of a server's root
            continue
        for address in [*page.loaded, *page.leads]:
            if re.match(r"[a-z]+:", address):
                continue
            inside += 1
            file, _, place = unquote(address).partition("#")
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (target in pages and place not in pages[target].places):
                broken.append(f"{path.relative_to(site)}: {address}")
    assert not broken and inside > 1000


def test_lists_and_tables_are_no_paragraphs(site):
    """The site's Markdown wants an empty line before a list or a table; a hosting site's does not."""
    texts = {path: _without_code(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    wrong = [f"{path.relative_to(site)}: {found[0][:60]}" for path, text in texts.items()
             for found in re.finditer(r"^(<p>)?([*|] .*|\|--.*)$", text, re.MULTILINE)]
    assert not wrong


def _without_code(html: str) -> str:
    return re.sub(r"<pre.*?</pre>|<script.*?</script>", "", html, flags=re.DOTALL)


def test_search_finds_whole_sentences_of_errors_and_docstrings(site):
    texts = "\n".join(re.sub(r"<[^>]+>", "", doc["text"]) for doc in
                      json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"])
    assert "… exists already; choose another --out or add --force." in texts
    assert "Open and verify a bundle" in texts and "Most tokens of the answer" in texts


def _small(folder: Path, *links: str) -> subprocess.CompletedProcess[str]:
    """Build a repository of three pages, the first of which has these links."""
    (folder / "docs" / "site").mkdir(parents=True)
    shutil.copy(REPOSITORY / "docs" / "site" / "pages.py", folder / "docs" / "site")
    (folder / "engines").mkdir()
    (folder / "engines" / "README.md").write_text("# One\n\n## Two\n\n[back](../docs/b.md)\n")
    (folder / "engines" / "a.toml").write_text("")
    (folder / "docs" / "a.md").write_text(
        "# A\n\n" + "\n\n".join(f"[link]({link})" for link in links) + "\n\n```\n[code](nothing.md)\n```\n")
    (folder / "docs" / "b.md").write_text("# B\n")
    (folder / "mkdocs.yml").write_text(
        "site_name: s\nuse_directory_urls: false\nexclude_docs: site/*.py\nhooks: [docs/site/pages.py]\n"
        "markdown_extensions: [fenced_code]\n")
    return _build(folder, folder / "out")


def test_links_of_the_repository_become_links_of_the_site(tmp_path):
    done = _small(tmp_path, "../engines/README.md#two", "../engines/", "../engines/a.toml", "b.md")
    assert done.returncode == 0, done.stderr
    leads = Page(tmp_path / "out" / "a.html").leads
    assert {"engines/index.html#two", "engines/index.html", "engines/a.toml", "b.html"} <= set(leads)
    assert "../b.html" in Page(tmp_path / "out" / "engines" / "index.html").leads
    assert (tmp_path / "out" / "engines" / "a.toml").is_file()


def test_broken_links_are_refused(tmp_path):
    done = _small(tmp_path, "../engines/none.md", "c.md")
    assert done.returncode != 0 and "../engines/none.md" in done.stderr and "'c.md'" in done.stderr
