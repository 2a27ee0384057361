"""A hook of mkdocs: pages outside docs/ are pages of the site, too, and every link leads to where its target is there.

Links are relative to the file that holds them, so that they work in an editor and on a hosting site, too. The site has
the files of docs/ at its root and everything else under its path in the repository. What is linked and is no page
(results, sources) is copied beside the pages. A link to what does not exist stays as it is: `--strict` refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "engines", "plugins", "samples", "tests/attacks", "tests/fuzz")
_LINK = re.compile(r"(?<=\]\()[^)\s#]+(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the README, the pages of FOLDERS and all files that a page links to."""
    outside = [p for folder in FOLDERS for p in sorted((REPOSITORY / folder).rglob("*.md"))]
    pages = [*sorted(REPOSITORY.glob("*.md")), *outside]
    inside = [Path(f.abs_src_path) for f in files if f.src_uri.endswith(".md")]
    linked = {found for page in [*pages, *inside] for link in _LINK.findall(_prose(page.read_text(encoding="utf-8")))
              if (found := _target(page, link)) and not _site(found).startswith("..")}
    for path in dict.fromkeys([*pages, *sorted(linked)]):
        if files.get_file_from_path(_site(path)) is None:
            files.append(File.generated(config, _site(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the repository's links of a page into the site's; a search shows sentences of errors first."""
    if page.file.src_uri.startswith("troubleshooting/"):
        page.meta["search"] = {"boost": 4}
    source = Path(page.file.abs_src_path)

    def moved(match: re.Match[str]) -> str:
        found = _target(source, match[0])
        return posixpath.relpath(_site(found), posixpath.dirname(page.file.src_uri) or ".") if found else match[0]

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def _target(page: Path, link: str) -> Path | None:
    """The file of the repository that a link of a page means; of a folder its README. None: an address, or nothing."""
    if re.match(r"[a-z]+:", link):
        return None
    path = Path(posixpath.normpath(f"{page.parent.as_posix()}/{link}"))
    path = path / "README.md" if path.is_dir() else path
    return path if path.is_file() and path.is_relative_to(REPOSITORY) else None


def _site(path: Path) -> str:
    """Where a file of the repository is in the site."""
    return path.relative_to(REPOSITORY).as_posix().removeprefix("docs/")
