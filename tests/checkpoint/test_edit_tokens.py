"""Control tokens of models that insert and delete: from config.json, given at export, held against the vocabulary."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from published_configs import LLADA21_MINI, LLADA22_FLASH

from dmoe_export.bundle.consistent import check_numbers
from dmoe_export.check.identity import first_difference
from dmoe_export.checkpoint.edit_tokens import give_edit_tokens
from dmoe_export.checkpoint.family import Checkpoint, family_of
from dmoe_export.cli.export import as_ids
from dmoe_export.description import EditTokens
from dmoe_export.errors import CheckpointError, InputError
from dmoe_export.export.conversion import identity


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A checkpoint whose config.json may be changed."""
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    return tmp_path / "c"


def say(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_the_published_config_names_them(tmp_path):
    def described(config):
        return family_of(config, tmp_path).describe(config, tmp_path)

    assert described(LLADA22_FLASH).edit_tokens == EditTokens(delete=156930, split=156931)
    assert described(LLADA21_MINI).edit_tokens is None


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"delete_token_id": 5}, "delete_token_id is 5 and split_token_id is missing; a model that inserts and deletes has "
                             "both."),
    ({"split_token_id": 5, "delete_token_id": None}, "split_token_id is 5 and delete_token_id is missing; a model"),
    ({"delete_token_id": 5, "split_token_id": 5}, "delete and split token are both 5."),
    ({"delete_token_id": 5, "split_token_id": 10**6}, "split token 1000000 is outside the vocabulary of "),
    ({"delete_token_id": -1, "split_token_id": 5}, "delete_token_id is -1, it must be a token id."),
    ({"delete_token_id": "5", "split_token_id": 5}, "field delete_token_id is '5', expected int."),
    ({"delete_token_id": 5, "split_token_id": 6, "eos_token_id": [7, 6]}, "split token 6 is the mask or ends an")])
def test_what_a_config_may_not_say(folder, fields, sentence):
    with pytest.raises(CheckpointError, match=re.escape(f"{folder / 'config.json'}: {sentence}")):
        Checkpoint(say(folder, **fields))


def test_the_ends_of_generation_config_count_too(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
    with pytest.raises(CheckpointError, match="delete token 5 is the mask or ends an answer, too"):
        Checkpoint(say(folder, delete_token_id=5, split_token_id=6))


def test_they_can_be_given_where_the_config_has_none(folder):
    source = Checkpoint(folder, layers=2)
    give_edit_tokens(source, (5, 6))
    assert source.description.edit_tokens == source.full_description.edit_tokens == EditTokens(delete=5, split=6)
    plain = Checkpoint(folder, layers=2)
    assert identity(source, ["a"]) == identity(plain, ["a"])  # the same model
    say(folder, delete_token_id=5, split_token_id=6)
    give_edit_tokens(Checkpoint(folder), (5, 6))  # said twice
    with pytest.raises(InputError, match=r"^Edit tokens 6,5 contradict .*config\.json, which says 5 and 6; leave"):
        give_edit_tokens(Checkpoint(folder), (6, 5))


@pytest.mark.parametrize(("given", "sentence"), [
    ((5,), "Edit tokens '5' are not two token ids; give DELETE and SPLIT, such as 156930,156931."),
    ((5, 6, 7), "Edit tokens '5,6,7' are not two"), ((5, -6), "Edit tokens '5,-6' are not two"),
    ((5, 5), "cannot be those of .*: delete and split token are both 5."),
    ((10**6, 5), "delete token 1000000 is outside the vocabulary of ")])
def test_what_may_not_be_given(tiny_checkpoint, given, sentence):
    with pytest.raises(InputError, match=sentence):
        give_edit_tokens(Checkpoint(tiny_checkpoint), given)


@pytest.mark.parametrize("text", ["", "5,", "5 6", "a,b", "-5,6", "5;6", "12345678901,5", "٥,6"])
def test_what_the_command_line_does_not_take(text):
    with pytest.raises(InputError, match="are not two token ids"):
        as_ids(None, None, text)


def test_a_bundle_holds_them(tiny_checkpoint, exported):
    bundle = exported(tiny_checkpoint, edit_tokens=as_ids(None, None, "5,6"))
    assert bundle.manifest.model.edit_tokens == EditTokens(delete=5, split=6)
    assert first_difference(bundle, Checkpoint(tiny_checkpoint)) is None
    d, routing = bundle.manifest.model, bundle.manifest.routing
    check_numbers(d, routing)
    for delete, split, words in ((d.vocab_size, 5, "outside the vocabulary"), (5, 5, "are both 5"),
                                 (d.mask_id, 5, "is the mask"), (5, d.eos_id, "ends an answer")):
        with pytest.raises(ValueError, match=words):
            check_numbers(d.model_copy(update={"edit_tokens": EditTokens(delete=delete, split=split)}), routing)
