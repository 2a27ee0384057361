"""The HTML report in a browser: its width, and its verdict."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import check_reports as given_by
import pytest

from dmoe_export.check.report import write_report


def many_layers():
    return given_by.report(layers_checked=64, layers_total=64, backends=[
        given_by.backend(64), given_by.backend(64, bad=40, layers_alone=[])])


CHROMIUM = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--allow-file-access-from-files", "--virtual-time-budget=3000"]
WIDE = """<iframe id=page src="r.html" style="border:0;width:{width}px;height:2000px"></iframe>
<pre id=said></pre><script>
onload = () => {{
  const page = document.getElementById("page").contentDocument, wide = [];
  for (const one of page.querySelectorAll("main *")) {{
    let inside = false;
    for (let above = one.parentElement; above; above = above.parentElement)
      inside ||= ["auto", "scroll"].includes(page.defaultView.getComputedStyle(above).overflowX);
    if (!inside && one.getBoundingClientRect().right > {width} + .5) wide.push(one.tagName);
  }}
  document.getElementById("said").textContent = page.documentElement.scrollWidth + " " + wide.join(" ");
}}</script>"""


def _browse(tmp_path, *arguments):
    return subprocess.run([*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}", *arguments], check=True, text=True,
                          capture_output=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("make", [given_by.report, given_by.failing, many_layers])
def test_nothing_is_wider_than_the_window(tmp_path, width, make):
    """A telephone's and a screen's; tables scroll inside their cards."""
    write_report(make(), tmp_path / "r.html")
    (tmp_path / "frame.html").write_text(WIDE.format(width=width))
    said = _browse(tmp_path, "--dump-dom", (tmp_path / "frame.html").as_uri())
    assert re.search(r'<pre id="said">(.*?)</pre>', said)[1].strip() == str(width)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize("make,colour", [(given_by.report, (11, 107, 58)), (given_by.failing, (176, 0, 32))])
def test_a_browser_shows_the_verdict(tmp_path: Path, width, make, colour):
    image = pytest.importorskip("PIL.Image")
    write_report(make(), tmp_path / "r.html")
    picture, page = tmp_path / "r.png", (tmp_path / "r.html").as_uri()
    _browse(tmp_path, f"--screenshot={picture}", f"--window-size={width},900", page)
    with image.open(picture) as shot:
        pixels = shot.convert("RGB").tobytes()
    assert pixels.count(bytes(colour)) > width * 40  # the banner
