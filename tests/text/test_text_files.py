"""What an export takes of a checkpoint's tokenizer and template files; compared with transformers 5.24 once."""

from __future__ import annotations

import json

import pytest
from text_codecs import TEMPLATE, byte_level, metaspace, word_level
from tokenizers import pre_tokenizers

from dmoe_export.checkpoint.chat_template import chat_template
from dmoe_export.checkpoint.text import read_text_side
from dmoe_export.errors import CheckpointError
from dmoe_export.text.codec import TextCodec


class Model:
    """What of a description counts here."""

    vocab_size, mask_id, eos_ids = 10**6, 0, (0,)


def _side(folder, tokenizer=None, model=Model, **files):
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer if isinstance(tokenizer, str) else tokenizer.to_str())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_text_side(folder, model)


def _codec(folder, side):
    (folder / "made.json").write_text(side.tokenizer)
    return TextCodec(folder / "made.json", side.template, None, side.special_tokens)


def test_an_ordinary_tokenizer_is_taken_as_it_is(tmp_path):
    text = word_level().to_str(pretty=True) + "\n"
    side = _side(tmp_path, text, tokenizer_config={"chat_template": TEMPLATE})
    assert (side.tokenizer, side.template, side.special_tokens, side.warnings) == (text, TEMPLATE, {}, [])


def test_truncation_and_padding_go(tmp_path):
    tokenizer = word_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    (tmp_path / "t.json").write_text(tokenizer.to_str())
    assert len(TextCodec(tmp_path / "t.json", None).encode_literal("what is two hello")) == 4
    side = _side(tmp_path, tokenizer)
    assert json.loads(side.tokenizer)["truncation"] is None and json.loads(side.tokenizer)["padding"] is None


def test_special_tokens_by_name_and_their_files(tmp_path):
    config = {"eos_token": "<s>", "pad_token": {"content": "<role>"}, "image_token": "</role>", "add_bos_token": True,
              "cls_token": None, "extra_special_tokens": {"audio": "<|mask|>"}}
    map_ = {"eos_token": {"content": "<|mask|>"}}
    side = _side(tmp_path, word_level(), tokenizer_config=config, special_tokens_map=map_)
    expected = {"pad_token": "<role>", "image_token": "</role>", "audio": "<|mask|>"}
    assert side.special_tokens == expected | {"eos_token": "<|mask|>"}  # the map goes first …
    side = _side(tmp_path, tokenizer_config=config | {"added_tokens_decoder": {}})
    assert side.special_tokens == expected | {"eos_token": "<s>"}  # … unless the config lists tokens
    side = _side(tmp_path, tokenizer_config={"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<s>"},
                 special_tokens_map={})
    assert side.special_tokens == {"eos_token": "<s>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def test_tokens_beside_the_tokenizer_are_added(tmp_path):
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    listed = {str(size): {"content": "<x>", "special": False}, str(size + 9): {"content": "<y>", "special": True},
              str(tokenizer.token_to_id("<role>")): {"content": "<role>", "lstrip": True, "normalized": False}}
    side = _side(tmp_path, tokenizer, tokenizer_config={"added_tokens_decoder": listed, "eos_token": "<end>"})
    made = _codec(tmp_path, side)._tokenizer
    assert [made.token_to_id(name) for name in ("<x>", "<y>", "<end>")] == [size, size + 1, size + 2]
    assert made.get_added_tokens_decoder()[made.token_to_id("<role>")].lstrip
    assert len(side.warnings) == 1 and f"'<y>' ({size + 1}, not {size + 9})" in side.warnings[0]

    side = _side(tmp_path, tokenizer_config={"pad_token": "<x>"}, added_tokens={"<x>": size, "</role>": 1})
    made = _codec(tmp_path, side)._tokenizer.get_added_tokens_decoder()
    assert made[size].special and not made[size].normalized and "another id than" in side.warnings[0]


def test_ids_beyond_the_model_are_said(tmp_path):
    class Small(Model):
        vocab_size = 20
    side = _side(tmp_path, word_level(), Small)
    assert len(side.warnings) == 1 and "outside the model's vocabulary of 20, first" in side.warnings[0]


def _slow(folder, class_name, **config):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate([*letters, "he", "Ġh", "Ġhe"])}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name, **config}))


def test_vocab_and_merges_become_a_tokenizer(tmp_path):
    listed = {"added_tokens_decoder": {"259": {"content": "<|endoftext|>", "special": True},
                                       "260": {"content": "<|mask|>", "special": True}}}
    pieces = {}
    for name in ("DreamTokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer"):
        _slow(tmp_path, name, **listed)
        made = _codec(tmp_path, side := _side(tmp_path))
        assert side.warnings == [] and made._tokenizer.token_to_id("<|mask|>") == 260
        pieces[name] = made._tokenizer.encode("he he123 e\u0301\n\n x").tokens
        assert made.decode(made.encode_plain("he he <|mask|> é")) == "he he <|mask|> é"
    assert pieces["DreamTokenizer"] == pieces["Qwen2TokenizerFast"] != pieces["GPT2Tokenizer"]
    assert pieces["DreamTokenizer"][:5] == ["he", "Ġhe", "1", "2", "3"]

    _slow(tmp_path, "GPT2Tokenizer", add_bos_token=True, bos_token="<|endoftext|>", **listed)
    assert _codec(tmp_path, _side(tmp_path)).encode_plain("he") == [259, 256]


def test_a_converted_tokenizer_covers_the_model(tmp_path):
    class Dream(Model):
        mask_id = 300
    _slow(tmp_path, "DreamTokenizer")
    with pytest.raises(CheckpointError, match="no token of the mask id 300"):
        _side(tmp_path, model=Dream)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("vocab.json", '{"a": 0}', "255 of 256 bytes have no token"),
    ("vocab.json", '{"a": "b"}', "ids that are no numbers"),
    ("merges.txt", "h e x\n", "line 1 is 'h e x'"), ("merges.txt", "q x\n", "make no tokenizer"),
    ("tokenizer_config.json", "[]", "holds no JSON object"),
    ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is or holds 5"),
    ("tokenizer_config.json", '{"eos_token": {"content": 5}}', "is no token"),
    ("tokenizer_config.json", '{"tokenizer_class": 5}', "tokenizer_class is 5"),
    ("tokenizer_config.json", '{"added_tokens_decoder": []}', "no object of ids"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"a": {"content": "x"}}}', "the id 'a'"),
    ("tokenizer_config.json", '{"additional_special_tokens": "x"}', "no list of tokens"),
    ("special_tokens_map.json", '{"bos_token": ["x"]}', "special_tokens_map.json: bos_token"),
    ("tokenizer.json", "{}", "cannot be read as a tokenizer"),
])
def test_damaged_files_are_named(tmp_path, name, content, words):
    _slow(tmp_path, "GPT2Tokenizer")
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        _side(tmp_path)


@pytest.mark.parametrize(("files", "words"), [
    ([], "has no tokenizer files"), (["tokenizer.model"], "(tokenizer.model) are of a kind"),
    (["vocab.json"], "vocab.json")])
def test_no_tokenizer_is_said(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_text("{}")
    side = _side(tmp_path)
    assert side.tokenizer is None and len(side.warnings) == 1 and words in side.warnings[0]


def test_spaces_that_would_be_cleaned_up_are_said(tmp_path):
    config = {"clean_up_tokenization_spaces": True}
    assert "cleaned up" in _side(tmp_path, metaspace(), tokenizer_config=config).warnings[0]
    assert _side(tmp_path, byte_level(), tokenizer_config=config).warnings == []


def test_where_a_chat_template_lies(tmp_path):
    def put(name, content):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8-sig")

    assert chat_template(tmp_path) == (None, [])
    put("chat_template.json", {"chat_template": "zero"})
    assert chat_template(tmp_path) == ("zero", [])
    put("tokenizer_config.json", {"chat_template": "one"})
    assert chat_template(tmp_path) == ("one", [])
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "two"}]
    put("tokenizer_config.json", {"chat_template": named})
    assert chat_template(tmp_path) == ("two", ["Chat takes the template named default; left out: tool."])
    put("tokenizer_config.json", {"chat_template": {"default": "three"}})
    assert chat_template(tmp_path) == ("three", [])
    put("additional_chat_templates/rag.jinja", "four")
    template, said = chat_template(tmp_path)  # as in transformers: files go before the config, and there is no default
    assert "raise_exception" in template and "named rag, and none named default" in said[0]
    put("chat_template.jinja", "five")
    assert chat_template(tmp_path) == ("five", ["Chat takes the template named default; left out: rag."])


@pytest.mark.parametrize("value", [5, ["x"], [{"name": "default"}], {"default": 5}, [{"template": "x"}]])
def test_what_is_no_chat_template(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: chat_template is neither a text nor"):
        chat_template(tmp_path)


def test_the_codec_is_found_under_its_old_name():
    from dmoe_export.runtime.text import TextCodec as old
    from dmoe_export.text.codec import TextCodec as new

    assert old is new
