"""Ids that end an answer: given at export, and warned of where a chat template has one that no file names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models

from dmoe_export.checkpoint.end_ids import give_end_ids
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.cli.export import as_end_ids
from dmoe_export.errors import InputError
from dmoe_export.export.conversion import identity
from dmoe_export.export.text_files import copy_text

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture
def folder(tiny_checkpoint, tmp_path) -> Path:
    """SDAR's case: config.json's one EOS is not what a chat's turn ends with."""
    copy = tmp_path / "chat"
    copy.mkdir()
    for file in tiny_checkpoint.iterdir():
        (copy / file.name).symlink_to(file)
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(copy / "tokenizer.json"))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


def warnings(source: Checkpoint) -> list[str]:
    return copy_text(source, SimpleNamespace(add_file=lambda name, data: None))[1]


def test_a_turn_that_ends_with_another_token_is_warned_of(folder):
    source = Checkpoint(folder)
    (eos,) = source.description.eos_ids
    assert warnings(source) == [
        f"The chat template of {folder} ends turns with '<|im_end|>' (2), which is not among the ids that end an "
        f"answer ({eos}, of config.json alone). If the model ends its answers so, export with --end-ids 2, else they "
        "go on behind their end."]
    give_end_ids(source, as_end_ids(None, None, "2"))
    assert source.description.eos_ids == source.full_description.eos_ids == (eos, 2) and warnings(source) == []
    assert identity(source, ["a"]) == identity(Checkpoint(folder), ["a"])  # the same model
    told = Checkpoint(folder)
    give_end_ids(told, [eos])  # it ends so, and somebody knows
    assert told.description.eos_ids == (eos,) and warnings(told) == []


@pytest.mark.parametrize("ends", [[2], [3]])
def test_a_generation_config_has_told_of_all(folder, ends):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert warnings(Checkpoint(folder)) == []
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    assert len(warnings(Checkpoint(folder))) == 1


@pytest.mark.parametrize(("given", "sentence"), [
    ((), "End ids '' are not token ids; give them with commas between, such as 151643,151645."),
    ((-1,), "End ids '-1' are not token ids"), ((10**6,), "End id 1000000 is outside the vocabulary of ")])
def test_what_may_not_be_given(tiny_checkpoint, given, sentence):
    with pytest.raises(InputError, match=sentence):
        give_end_ids(Checkpoint(tiny_checkpoint), given)
    source = Checkpoint(tiny_checkpoint)
    with pytest.raises(InputError, match="or a mask, delete or split token of "):
        give_end_ids(source, [source.description.mask_id])


@pytest.mark.parametrize("text", ["", "5,", "a", "-5"])
def test_what_the_command_line_does_not_take(text):
    with pytest.raises(InputError, match=r"^End ids .* are not token ids"):
        as_end_ids(None, None, text)
