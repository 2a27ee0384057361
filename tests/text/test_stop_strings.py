"""Stop strings: text ends before the first that is complete, whatever the blocks, and none of it was shown."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_codecs import KINDS, codec

from dmoe_export.text.codec import TextStream


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    return {kind: codec(make(), tmp_path_factory.mktemp("c")) for kind, make in KINDS.items()}


def pushed(subject, ids, cuts, stops):
    """Pieces, and the tokens up to the one that completes a stop string, or all."""
    stream, pieces, taken = TextStream(subject, stops), [], 0
    blocks = list(zip([0, *cuts], [*cuts, len(ids)], strict=True))
    for at, (start, end) in enumerate(blocks):
        pieces.append(stream.push(ids[start:end], at == len(blocks) - 1))
        if stream.kept is not None:
            return pieces, taken + stream.kept, True
        taken += end - start
    return pieces, taken, False


def first(text, stops):
    """Where the stop string begins that is complete first, as a reader of one letter after the other would say."""
    for end in range(len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            return end - max(map(len, ended))
    return None


@pytest.mark.parametrize("kind", ["word-level", "byte-level", "metaspace first"])
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text("heo .é€😀", max_size=12), stops=st.lists(st.text("heo .é€😀", min_size=1, max_size=3), max_size=3),
       data=st.data())
def test_the_blocks_do_not_matter(codecs, kind, text, stops, data):
    subject = codecs[kind]
    ids = subject.encode_literal(text)
    whole = subject.decode(ids)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    pieces, taken, stopped = pushed(subject, ids, cuts, stops)
    place = first(whole, stops)
    assert stopped == (place is not None) and "".join(pieces) == whole[:place]
    if stopped:
        assert any(stop in subject.decode(ids[:taken]) for stop in stops)
        assert taken == 0 or not any(stop in subject.decode(ids[:taken - 1]) for stop in stops)
    else:
        assert taken == len(ids)


def test_what_may_be_a_beginning_waits(codecs):
    subject = codecs["byte-level"]
    ids = [subject.encode_literal(letter) for letter in "ab\n\nc"]
    stream = TextStream(subject, ["\n\nc", "b\n!"])
    assert [stream.push(part, False) for part in ids] == ["a", "", "", "b", ""]
    assert stream.kept == len(ids[-1])
    stream = TextStream(subject, ["\n\nc"])
    assert [stream.push(part, at == 3) for at, part in enumerate(ids[:4])] == ["a", "b", "", "\n\n"]
    assert stream.kept is None


def test_half_a_letter_is_no_stop_string_yet(codecs):
    """The bytes of € come apart, and with them the stop string."""
    subject = codecs["byte-level"]
    ids = subject.encode_literal("x€!")
    assert len(ids) > 3
    for cut in range(len(ids)):
        pieces, taken, stopped = pushed(subject, ids, [cut], ["€"])
        assert (pieces[0] + "".join(pieces[1:]), stopped) == ("x", True)
        assert taken == len(ids) - 1
