"""The page in a headless Chromium, as a person uses it: `make test-page`, whose pictures are in out/page."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from chromium import CHROMIUM, Page
from page_helpers import house_of, served

from dmoe_export.decoding.template import Gap
from dmoe_export.serving import denoising

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]
QUESTION = "there are 16 pens in a box. max gets 4 more pens and then max loses 14 of the pens. how many pens are left?"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
READY = "document.querySelector('[name=steps]')"
ENDED = "document.querySelector('.after-answer') && !document.querySelector('#send').hidden"
SEEN = "document.querySelectorAll('#places .place:not(.masked)').length"
SETTINGS = {"acceptance": "fixed", "steps": "8"}


@pytest.fixture(scope="module")
def house(sample_bundle):
    with house_of(sample_bundle) as house:
        yield house


@pytest.fixture(scope="module")
def server(house):
    with served(house) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser, server):
    """Opened, in a wide window."""
    browser.window(1280, 800)
    browser.logged.clear()
    browser.requested.clear()
    browser.open(server, READY)
    yield browser
    assert not browser.logged  # no error, and nothing that the policy refused


@pytest.fixture
def slow(house, monkeypatch):
    """Steps that last long enough to be seen."""
    backend = house.models["sample"].generator.backend
    forward = backend.forward

    def slowly(*arguments):
        time.sleep(0.15)
        return forward(*arguments)

    monkeypatch.setattr(backend, "forward", slowly)


@pytest.fixture
def pictures(tmp_path):
    folder = Path(os.environ.get("PAGE_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def choose(page, **values):
    for name, value in values.items():
        page.run(f"document.querySelector('[name={name}]').value = '{value}'")


def ask(page, question=QUESTION):
    assert page.run("document.activeElement.id") == "message"
    page.type(question)
    page.key("Enter")


def said(page):
    return page.run("[...document.querySelectorAll('.committed')].map(one => one.textContent)")


def test_a_question_asked_by_keyboard_is_answered_before_the_eyes(page, house, slow, pictures):
    choose(page, **SETTINGS)
    ask(page)
    page.until(f"{SEEN} > 3 && document.querySelector('.answer .live .masked')")
    assert said(page) == [""]  # nothing provisional in what is read aloud
    assert page.run("document.querySelector('.live').getAttribute('aria-hidden')") == "true"
    page.picture(pictures / "desktop-filling.png")
    page.until(ENDED)
    offline = house.models["sample"].generator.generate(QUESTION, acceptance="fixed", steps=8)[0]
    assert said(page) == [offline.text]
    assert page.run("document.querySelector('.live').textContent") == ""
    figure = {name: page.run(f"document.getElementById('f-{name}').textContent") for name in
              ("forwards", "per-forward", "per-second", "experts")}
    assert figure["forwards"] == str(offline.stats.forwards)
    assert float(figure["per-forward"]) == pytest.approx(offline.stats.tokens_per_forward, abs=0.01)
    assert float(figure["per-second"]) > 0 and 0 < float(figure["experts"]) <= 32
    assert page.run("document.querySelectorAll('#by-layer .bar').length") == 3
    page.picture(pictures / "desktop-answered.png")
    assert (pictures / "desktop-answered.png").stat().st_size > 20_000


def test_a_conversation_goes_on(page, house):
    generator = house.models["sample"].generator
    ask(page, "what is 5 x 8?")
    page.until(ENDED)
    first = said(page)[0]
    ask(page, "what is 2 plus 3?")
    page.until("document.querySelectorAll('.after-answer button').length == 2")
    messages = [{"role": "user", "content": "what is 5 x 8?"}, {"role": "assistant", "content": first},
                {"role": "user", "content": "what is 2 plus 3?"}]
    assert said(page) == [first, generator.generate([messages])[0].text]
    page.run("document.getElementById('fresh').click()")
    assert said(page) == [] and not page.run("document.getElementById('empty').hidden")


def test_steps_are_gone_through_by_keyboard(page):
    choose(page, **SETTINGS)
    ask(page)
    page.until(ENDED)
    last = page.run("Number(document.getElementById('step').max)")
    page.run("document.querySelector('.after-answer button').click()")
    assert last > 2 and page.run("document.activeElement.id") == "step"
    first = page.run(SEEN)
    page.key("ArrowRight")
    assert page.run("document.getElementById('step').value") == "1" and page.run(SEEN) > first
    page.key("End")
    assert page.run("document.getElementById('where').textContent").startswith(f"step {last + 1} of {last + 1}")
    assert page.run("document.getElementById('on').disabled")


GAPS = "there are <gap:3> pens in a box. max gets <gap:12> and then max loses <gap:30> of the pens."
PARTS = ["there are ", Gap(3), " pens in a box. max gets ", Gap(12), " and then max loses ", Gap(30), " of the pens."]


def test_a_text_with_gaps_fills_in(page, house, slow, pictures):
    choose(page, **SETTINGS)
    ask(page, GAPS)
    page.until("document.querySelectorAll('.answer .live .given').length == 4")
    assert page.run("document.querySelectorAll('.live .place').length") == 45
    page.until("document.querySelectorAll('.live .place:not(.masked)').length > 20")
    assert said(page) == [""] and page.run("document.querySelectorAll('.live .place').length") == 45
    page.picture(pictures / "desktop-gaps-filling.png")
    page.until(ENDED)
    wanted = house.models["sample"].generator.infill(PARTS, acceptance="fixed", steps=8)[0]
    assert said(page) == [wanted.text] and page.run("document.querySelector('.live').textContent") == ""
    filled = page.run("[...document.querySelectorAll('.committed .filled')].map(one => one.textContent)")
    assert filled == [gap.text for gap in wanted.gaps]
    unseeing = [i + 1 for i, gap in enumerate(wanted.gaps) if not gap.in_sight]
    after = page.run("document.querySelector('.after-answer').textContent")
    assert after.startswith(f"45 tokens in {wanted.answer.stats.forwards} forward passes")
    assert [i for i in (1, 2, 3) if f"gap {i} saw nothing of the text behind it" in after] == unseeing
    assert not page.run("document.getElementById('l-given').hidden")
    page.picture(pictures / "desktop-gaps-filled.png")
    ask(page, "what is 5 x 8?")  # the text was no turn of the conversation
    page.until("document.querySelectorAll('.after-answer button').length == 2")
    generator = house.models["sample"].generator
    assert said(page)[1] == generator.generate("what is 5 x 8?", acceptance="fixed", steps=8)[0].text
    assert page.run("document.getElementById('l-given').hidden")


def test_a_mark_is_written_as_text_with_another_bracket(page, house):
    ask(page, "what is <<gap:3> and <gap:x>?")
    page.until(ENDED)
    assert said(page) == [house.models["sample"].generator.generate("what is <gap:3> and <gap:x>?")[0].text]
    parts = page.run("import('./page/infill.js').then(({ partsOf }) => partsOf('<gap:2-8><<<gap:1> <gap:1>'))")
    assert parts == [{"gap": [2, 8]}, "<<gap:1> ", {"gap": 1}]


def test_a_gap_that_is_none_is_refused_in_the_server_s_sentence(page):
    ask(page, "it is <gap:0>.")
    page.until("!document.getElementById('trouble').hidden")
    sentence = "infill.1 has the gap 0, it must be its tokens, at least 1, or [fewest, most]."
    assert page.run("document.getElementById('trouble').textContent") == sentence
    page.logged[:] = [line for line in page.logged if "status of 400" not in line]  # the browser's own remark


def test_everything_is_reached_by_tab_and_focus_is_seen(page):
    seen = []
    page.run("document.getElementById('message').focus()")
    for _ in range(5):
        seen.append(page.run("document.activeElement.id"))
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.key("Tab")
        if page.run("document.activeElement === document.body"):
            page.key("Tab")  # past the window's own controls
    assert {"message", "send", "fresh", "open-settings"} <= set(seen)


def test_escape_stops_and_frees_the_row(page, house, slow):
    choose(page, acceptance="fixed", steps="32", max_new_tokens="128", eos_id="-1")
    ask(page)
    page.until(f"{SEEN} > 1")
    page.key("Escape")
    page.until(ENDED)
    assert page.run("document.querySelector('.after-answer').textContent").find("stopped") > 0
    over = time.monotonic() + 5
    while house.busy and time.monotonic() < over:
        time.sleep(0.02)
    assert not house.busy
    choose(page, steps="2", eos_id="")
    ask(page, "what is 5 x 8?")
    page.until("document.querySelectorAll('.after-answer button').length == 2")


@pytest.mark.parametrize("width,scheme", [(360, "light"), (360, "dark"), (1280, "dark")])
def test_nothing_is_wider_than_the_window(page, slow, pictures, width, scheme):
    page.window(width, 740, scheme)
    fits = f"document.documentElement.scrollWidth <= {width} && document.querySelector('main').scrollWidth <= {width}"
    assert page.run(fits)
    choose(page, **SETTINGS)
    ask(page, QUESTION + " " + "m" * 80)
    page.until(f"{SEEN} > 3")
    assert page.run(fits)
    page.picture(pictures / f"{scheme}-{width}-filling.png")
    page.until(ENDED)
    assert page.run(fits)
    page.run("document.getElementById('open-settings').click()")
    assert page.run(fits) and page.run("document.getElementById('settings').scrollWidth") <= width
    page.picture(pictures / f"{scheme}-{width}-settings.png")
    page.key("Escape")
    assert not page.run("document.getElementById('settings').open")


def test_hostile_text_stays_text(page, house, monkeypatch):
    event = denoising.event

    def hostile(data, name=None):
        if name == "step":
            data["pieces"] = [HOSTILE] * len(data["pieces"])
        return event(data | {"text": HOSTILE} if name == "block" else data, name)

    monkeypatch.setattr(denoising, "event", hostile)
    choose(page, **SETTINGS)
    ask(page, HOSTILE)
    page.until(ENDED)
    assert page.run("document.querySelector('.user').textContent") == HOSTILE
    assert said(page) == [HOSTILE]
    assert page.run("document.querySelectorAll('main img, main script').length") == 0
    assert page.run("document.title") == "dmoe-export"


def test_a_refused_setting_is_said_in_the_server_s_sentence(page):
    choose(page, threshold="many")
    ask(page)
    page.until("!document.getElementById('trouble').hidden")
    assert page.run("document.getElementById('trouble').textContent") == "threshold is 'many', it must be a number."
    choose(page, threshold="")
    ask(page)
    page.until("document.querySelector('.after-answer button')")
    assert page.run("document.getElementById('trouble').hidden")
    page.logged[:] = [line for line in page.logged if "status of 400" not in line]  # the browser's own remark


def test_it_asks_for_a_key_where_the_server_does(browser, house):
    with served(house, ["secret"]) as url:
        browser.open(url, "document.querySelector('#key-row:not([hidden])')")
        assert browser.run("document.activeElement.id") == "key"
        browser.type("secret")
        browser.key("Enter")
        browser.until(READY)
        ask(browser, "what is 5 x 8?")
        browser.until("document.querySelector('.after-answer button')")
        assert "secret" not in browser.run("document.documentElement.outerHTML")


def test_it_only_talks_to_its_own_server(page, server):
    ask(page, "what is 5 x 8?")
    page.until(ENDED)
    assert page.requested and all(address.startswith(server) for address in page.requested)
    assert page.run("document.querySelectorAll('[aria-live]:not(.committed)').length") == 0


def test_motion_is_reduced_where_it_is_asked_for(page, slow):
    page.window(1280, 800, motion="reduce")
    choose(page, **SETTINGS)
    ask(page)
    page.until("document.querySelector('#places .place.new')")
    assert page.run("getComputedStyle(document.querySelector('#places .place.new')).animationName") == "none"
    page.until(ENDED)
