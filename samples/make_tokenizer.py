"""Writes the sample's tokenizer: whole words and single digits, in the files a Hugging Face checkpoint has."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import click
from tasks import training_examples
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

UNKNOWN, EOS, MASK = "<unk>", "<|endoftext|>", "<|mask|>"
SPECIAL = (UNKNOWN, EOS, MASK, "<role>", "</role>", "<|role_end|>")
ROLES = (" system", " human", " assistant")
PUNCTUATION = (".", ",", "?", ":")
VOCABULARY_SAMPLE = 20_000  # every word of the templates is far more common than one in this many examples

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
<role>SYSTEM</role>{{ message['content'] }}<|role_end|>
{%- elif message['role'] == 'user' -%}
<role>HUMAN</role>{{ message['content'] }}<|role_end|>
{%- elif message['role'] == 'assistant' -%}
<role>ASSISTANT</role>{{ message['content'] }}<|role_end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<role>ASSISTANT</role>
{%- endif -%}
"""


def build_tokenizer() -> Tokenizer:
    """The tokenizer, its vocabulary taken from the tasks.

    A token carries the space before it, so that decoding needs no rules for spaces: " 1" "9" is " 19". Text is given
    a leading space and loses it again in decoding; punctuation is set apart and glued back.
    """
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
    apart = [normalizers.Replace(mark, f" {mark}") for mark in PUNCTUATION]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *apart,
                                                 normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(),
                                                 normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[a-z]+| ?[0-9]| ?[^a-z0-9 ]"), behavior="isolated")
    glue = [decoders.Replace(f" {mark}", mark) for mark in PUNCTUATION]
    tokenizer.decoder = decoders.Sequence([*glue, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    pieces = {f"{space}{digit}" for space in ("", " ") for digit in range(10)} | set(ROLES)
    for example in itertools.islice(training_examples(seed=0), VOCABULARY_SAMPLE):
        for text in (example.question, example.answer):
            words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
            pieces.update(word for word, _ in words)
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pieces)])}
    tokenizer.model = models.WordLevel(vocabulary, unk_token=UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Ids of EOS and mask."""
    vocabulary = tokenizer.get_vocab()
    return vocabulary[EOS], vocabulary[MASK]


def write_tokenizer(folder: Path) -> Tokenizer:
    """Build the tokenizer and write its three files into a checkpoint folder."""
    tokenizer = build_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": UNKNOWN, "eos_token": EOS, "pad_token": EOS,
              "mask_token": MASK, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into FOLDER."""
    print(f"{write_tokenizer(folder).get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
