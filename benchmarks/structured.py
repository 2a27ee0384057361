"""What a grammar costs: to compile, for the masks of tokens, in a step; with a vocabulary of LLaDA2's size, made here.

    python benchmarks/structured.py [BUNDLE] --out benchmarks/results/structured_<device>_<date>.json

With a bundle also its steps with and without `regex`, in turns. `outlines_core.Index` over the whole vocabulary is what
left-to-right decoding would use; it knows which tokens go on from a state, and not which canvas can be completed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from measuring import machine, now, write_result
from outlines_core import Index
from outlines_core import Vocabulary as LibraryVocabulary

from dmoe_export import Generator
from dmoe_export.decoding.constrained import Constrained
from dmoe_export.decoding.outcome import Outcome
from dmoe_export.decoding.row import Row
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.description import ModelDescription
from dmoe_export.grammar.automaton import automaton_of
from dmoe_export.grammar.canvas import MASKED, Canvas, Rule
from dmoe_export.grammar.grammar import Grammar
from dmoe_export.grammar.steps import Steps
from dmoe_export.grammar.vocabulary import Trie, Vocabulary
from dmoe_export.runtime.backend import ForwardOutputs
from dmoe_export.runtime.candidates import best_of

STRING = r'"([^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-f]{4})*"'
NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
REGEXES = {
    "date": r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    "two fields": rf'\{{"name":{STRING},"age":(0|[1-9][0-9]{{0,2}})\}}',
    "six fields": rf'\{{"name":[ ]?{STRING},[ \n]*"email":[ ]?{STRING},[ \n]*"kind":[ ]?("customer"|"supplier"),'
                  rf'[ \n]*"score":[ ]?{NUMBER},[ \n]*"tags":[ ]?\[({STRING}(,[ ]?{STRING}){{0,4}})?\],'
                  r'[ \n]*"when":[ ]?"[0-9]{4}-[0-9]{2}-[0-9]{2}"[ \n]*\}',
    "counted strings": r'\{"title":"[^"\\\x00-\x1f]{0,100}","body":"[^"\\\x00-\x1f]{0,200}"\}'}
MASK, END = 157_183, 157_182
WIDTH = 32


def vocabulary_of(size: int) -> Vocabulary:
    """Bytes, then words, Han characters, signs and runs of blanks; the last 64 tokens spell nothing."""
    rng, pieces = np.random.default_rng(0), dict.fromkeys(bytes([byte]) for byte in range(256))
    letters, share = np.frombuffer(b"etaoinshrdlcumwfgypbvkjxqz", np.uint8), 1 / np.arange(1, 27)
    signs = np.frombuffer(b"{}[]()\":,.;'<>/\\ \n\t=-+*&0123456789", np.uint8)
    while len(pieces) < size - 64:
        kind, word = rng.random(), bytes(rng.choice(letters, int(rng.integers(1, 11)), p=share / share.sum()))
        if kind < 0.4:
            word = b" " + word
        elif kind < 0.5:
            word = word.capitalize()
        elif kind < 0.7:
            word = "".join(map(chr, rng.integers(0x4e00, 0x9fa0, int(rng.integers(1, 4))).tolist())).encode()
        elif kind < 0.8:
            word = bytes(rng.choice(signs, int(rng.integers(2, 6))))
        elif kind < 0.83:
            word = b" " * int(rng.integers(2, 80))
        pieces[word] = None
    return Vocabulary([*pieces, *[b""] * 64])


def timed(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Median milliseconds, and what the last came to."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        made = work()
        times.append((time.perf_counter() - start) * 1e3)
    return round(median(times), 3), made


def masks(steps: Steps) -> float:
    """Median milliseconds of the mask over all tokens that one state leads to, unremembered."""
    rule = Rule(steps, [MASKED] * 64, 0, [END], [MASK])
    wanted, states = rule.rest(32), np.random.default_rng(0).integers(1, steps.done, 50).tolist()
    times = []
    for state in states:
        start = time.perf_counter()
        steps.allowed(steps.only([state]), wanted)
        times.append((time.perf_counter() - start) * 1e3)
    return round(median(times), 3)


def library(regex: str, pieces: list[bytes], rounds: int) -> dict[str, Any]:
    """`outlines_core.Index` over the same tokens."""
    tokens: dict[bytes, list[int]] = {}
    for token, piece in enumerate(pieces):
        if piece:
            tokens.setdefault(piece, []).append(token)
    compile_ms, index = timed(lambda: Index(regex, LibraryVocabulary(END, tokens)), 1)
    states = list(index.get_transitions())[:50]
    mask = np.zeros(len(pieces), bool)

    def fill(state: int) -> None:
        mask[:] = False
        mask[index.get_allowed_tokens(state)] = True

    return {"compile_ms": compile_ms, "mask_ms": median(timed(lambda s=s: fill(s), 1)[0] for s in states)}


def steps_of(grammar: Grammar, rounds: int) -> dict[str, Any]:
    """Host milliseconds of a step's decision for a block of masked places, with a grammar and without."""
    d = ModelDescription(
        family="toy", architecture="t", vocab_size=MASK + 1, hidden_size=4, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=4, dense_width=4, moe=None, qk_norm=True, rope_theta=1e4, rotary_dim=4, rms_eps=1e-6,
        max_positions=4096, tie_embeddings=False, mask_id=MASK, eos_ids=(END,), pad_id=END, attention="block_causal")
    logits = np.random.default_rng(0).normal(0, 3, (1, WIDTH, MASK + 1)).astype(np.float32)
    said = {}
    for name, options in {"greedy": {}, "sampling": {"temperature": 0.8}, "sampling, top_k 50": {
            "temperature": 0.8, "top_k": 50}}.items():
        settings = DecodeSettings(regex="x", steps=8, **options)
        plain = Outcome(DecodeSettings(steps=8, **options), MASK, MASK + 1)
        rule = Rule(grammar.steps, [MASKED] * 128, 0, [END], [MASK])
        bound = Constrained(settings, MASK, MASK + 1, grammar, rule)
        row = {}
        for which, way in (("plain", plain), ("grammar", bound)):
            found = best_of(logits, MASK, way.candidates) if way.candidates else None
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            shares[..., MASK] = 0
            outputs = ForwardOutputs(shares.argmax(-1), shares.max(-1), np.zeros((0, 1, WIDTH, 0), np.int32), logits,
                                     None, found)

            def step(way=way, settings=way._settings, outputs=outputs) -> None:
                one = Row(0, [1] * 32, settings, d, 32, 0)
                way.apply(one, way.asked(one), outputs, 0)

            step()
            row[which] = timed(step, rounds)[0]
        said[name] = row
    return said


def of_bundle(bundle: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of a forward and its decision on a bundle, with a regex that its answers match anyway."""
    question, regex = "what is 2 plus 3?", r"[0-9]+ \+ [0-9]+ = [0-9]+"
    totals: dict[str, list[float]] = {"plain": [], "grammar": []}
    inside = []
    with Generator.open(bundle, backend="onnxruntime", threads=1, verify="sizes") as generator:
        for i in range(2 * rounds + 2):
            which = ("plain", "grammar")[i % 2]
            options: dict[str, Any] = {"regex": regex} if which == "grammar" else {}
            request = generator.request(question, max_new_tokens=32, steps=8, acceptance="fixed", **options)
            batch = generator.batch(1)
            batch.add(request)
            start, steps = time.perf_counter(), 0
            while len(batch):
                events = batch.step()
                steps += 1
            if i > 1:  # warm
                totals[which].append((time.perf_counter() - start) * 1e3 / steps)
                if which == "grammar":
                    inside.append(events[-1].block.stats.grammar_seconds * 1e3 / steps)
    plain, bound = median(totals["plain"]), median(totals["grammar"])
    return {"bundle": bundle.name, "plain_step_ms": plain, "grammar_step_ms": bound, "ratio": bound / plain,
            "grammar_ms_of_it": median(inside)}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--rounds", default=9)
@click.option("--out", type=click.Path(path_type=Path))
def main(bundle: Path | None, rounds: int, out: Path | None) -> None:
    """Measure."""
    vocabulary = vocabulary_of(MASK + 1)
    trie_ms, trie = timed(lambda: Trie(vocabulary), 3)
    result: dict[str, Any] = {
        "date": now(), "machine": machine(), "tokens": len(vocabulary.pieces), "places": WIDTH,
        "trie": {"ms": trie_ms, "nodes": trie.nodes, "bytes": sum(a.nbytes for pair in (*trie.levels, *trie.ends)
                                                                  for a in pair)}, "grammars": {}}
    for name, regex in REGEXES.items():
        automaton_ms, automaton = timed(lambda regex=regex: automaton_of(regex), 3)
        compile_ms, steps = timed(lambda automaton=automaton: Steps(automaton, vocabulary, trie), 3)
        rule_ms, rule = timed(lambda steps=steps: Rule(steps, [MASKED] * 128, 0, [END], [MASK]), 1)
        result["grammars"][name] = {
            "states": automaton.states, "maps": steps.maps, "kept_bytes": steps._maps.nbytes + steps._map_of.nbytes,
            "automaton_ms": automaton_ms, "tokens_ms": compile_ms, "rule_ms": rule_ms,
            "canvas_ms": timed(lambda rule=rule: Canvas(rule, [], [MASKED] * WIDTH), 1)[0], "mask_ms": masks(steps),
            "step_ms": steps_of(Grammar(automaton, steps), rounds),
            "outlines_core": library(regex, list(vocabulary.pieces), rounds)}
    if bundle:
        result["sample"] = of_bundle(bundle, 3 * rounds)
    write_result(result, out)


if __name__ == "__main__":
    main()
