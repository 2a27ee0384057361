"""lm-eval's tasks on a bundle in this process: the adapter on a base class like lm-eval's, and on lm-eval itself."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import SAMPLE

from dmoe_export import Generator, MissingRequirementError, RequestError

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-lm-eval" / "bin" / "python"
NAME = "dmoe_export.bench.lm_eval"
QUESTION, RIGHT, WRONG = "what is 2 plus 3?", "2 + 3 = 5", "2 + 3 = 6"
CHAT = [{"role": "user", "content": QUESTION}]
needs_lm_eval = pytest.mark.skipif(not PYTHON.exists(), reason="lm-eval is not installed: make lm-eval")


class TemplateLM:
    """What the adapter uses of lm-eval 0.4.13's class of this name."""

    def __init__(self):
        self.kept = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *told: self.kept.append(told))

    def _encode_pair(self, context, continuation):
        whole, before = self.tok_encode(context + continuation), self.tok_encode(context)
        return before, whole[len(before):]

    def loglikelihood(self, requests, disable_tqdm=False):
        return self._loglikelihood_tokens([(one.args, *self._encode_pair(*one.args)) for one in requests],
                                          disable_tqdm=disable_tqdm)


def windows(tokens, prefix, most, context):
    """Each token once, all but the first window behind one token of the text."""
    assert context == 1
    for start in range(0, len(tokens), most):
        here = tokens[start:start + most]
        yield [prefix if start == 0 else tokens[start - 1], *here[:-1]], here


@pytest.fixture
def module(monkeypatch):
    """The adapter's module over the stand-in."""
    registered = {}
    stand_ins = {"lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"TemplateLM": TemplateLM},
                 "lm_eval.api.registry": {
                     "register_model": lambda name: lambda kind: registered.setdefault(name, kind)},
                 "lm_eval.utils": {"get_rolling_token_windows": windows,
                                   "make_disjoint_window": lambda pair: (pair[0][:len(pair[0]) - len(pair[1]) + 1],
                                                                         pair[1])}}
    for name, content in stand_ins.items():
        stand_in = ModuleType(name)
        vars(stand_in).update(content)
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    assert registered.keys() == {"dmoe-export"}
    del sys.modules[NAME]


@pytest.fixture(scope="module")
def generator(sample_bundle):
    with Generator.open(sample_bundle.folder, backend="onnxruntime", threads=1, verify="sizes") as one:
        yield one


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


def test_likelihoods_are_scores_in_the_order_of_the_requests(module, generator):
    model = module.BundleLM(generator, batch_size="3", estimator="monte_carlo", samples=4)
    chat = model.apply_chat_template(CHAT)
    found = model.loglikelihood(requests((chat, RIGHT), (chat, WRONG), ("2 + 3", " = 5"), (chat, "paris")))
    plain = [generator.text.encode_plain(text) for text in ("2 + 3", "2 + 3 = 5")]
    options = {"estimator": "monte_carlo", "samples": 4}
    wanted = [*generator.score(QUESTION, [RIGHT, WRONG], **options),
              *generator.score(plain[0], [plain[1][len(plain[0]):]], **options),
              *generator.score(QUESTION, ["paris"], **options)]
    assert [greedy for _, greedy in found] == [one.is_greedy for one in wanted] and found[0][1] and not found[1][1]
    assert [value for value, _ in found] == pytest.approx([one.log_probability for one in wanted], abs=1e-4)
    assert model.kept == [("loglikelihood", texts, one) for texts, one in zip(
        [(chat, RIGHT), (chat, WRONG), ("2 + 3", " = 5"), (chat, "paris")], found, strict=True)]


def test_whole_texts_are_scored_in_windows(module, generator, monkeypatch):
    text = " ".join(["what is the sum of 3 4 5?"] * 9)
    ids, end = generator.text.encode_literal(text), generator.backend.description.eos_id
    model = module.BundleLM(generator)
    assert model.loglikelihood_rolling(requests((text,)))[0] == pytest.approx(
        generator.score([end], [ids])[0].log_probability, abs=1e-4)
    monkeypatch.setattr(module.BundleLM, "max_length", 41)
    pairs = [([end] if not start else ids[start - 1:start], [ids[start:start + 40]])
             for start in range(0, len(ids), 40)]
    wanted = sum(score.log_probability for (score,) in generator.score_all(pairs))
    assert len(pairs) > 1 and model.loglikelihood_rolling(requests((text,)))[0] == pytest.approx(wanted, abs=1e-3)


def test_answers_are_those_of_generate(module, generator):
    model = module.BundleLM(generator, batch_size=2)
    chat = model.apply_chat_template(CHAT)
    found = model.generate_until(requests(
        (chat, {"until": [], "max_gen_toks": 64, "do_sample": False}), (chat, {"until": "=", "steps": 8}),
        ("2 + 3 =", {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0.7}),
        (chat, {"until": [], "max_gen_toks": 64, "do_sample": False})))
    drawn = generator.generate("2 + 3 =", chat=False, max_new_tokens=8, temperature=0.7, stop=["\n\n"])[0].text
    assert found == [RIGHT, "2 + 3 ", drawn, RIGHT]
    with pytest.raises(RequestError, match=r"^Unknown generation option: num_beams\.$"):
        model.generate_until(requests((chat, {"num_beams": 4})))


def test_what_it_cannot_do_is_refused(module, generator, monkeypatch):
    for options, sentence in (
            ({"speed": 1}, "Model dmoe-export of lm-eval has no option speed; it takes those of Generator.open and "
             "Generator.score, and batch_size."),
            ({"batch_size": "auto"}, "batch_size is 'auto', it must be a number of rows such as 8."),
            ({"estimator": "best"}, "estimator is best, it must be one_pass or monte_carlo.")):
        with pytest.raises(RequestError) as refused:
            module.BundleLM(generator, **options)
        assert str(refused.value) == sentence
    model = module.BundleLM(generator, device="cuda:0")
    with pytest.raises(RequestError, match=r"^The task begins the answer itself \(gen_prefix\), and no chat context"):
        model.apply_chat_template(CHAT, add_generation_prompt=False)
    monkeypatch.setattr(generator, "text", None)
    with pytest.raises(RequestError, match="has no tokenizer for the texts of lm-eval; export the checkpoint with"):
        model.tok_encode("a")


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(MissingRequirementError, match=r"^The adapter for lm-eval needs lm_eval\S*; run: pip install "):
        importlib.import_module(NAME)


def test_wrong_answers_of_the_task_are_other_rows_answers(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "samples" / "lm_eval")
    rows = [json.loads(line) for line in (SAMPLE / "held_out.jsonl").read_text().splitlines()]
    task = importlib.import_module("choices")
    for number, row in enumerate(rows):
        made = task.choices_of(rows, number)
        assert made["choices"][made["right"]] == row["answer"] and len(set(made["choices"])) == 4
    assert np.bincount([task.choices_of(rows, number)["right"] for number in range(400)]).tolist() == [100] * 4


def run(bundle, out, *words):
    """lm-eval's command line on the adapter: results and logged samples of the task."""
    subprocess.run([PYTHON, "-m", NAME, "run", "--model", "dmoe-export", "--include_path", "samples/lm_eval",
                    "--apply_chat_template", "--log_samples", "--batch_size", "8", "--output_path", out, *words],
                   cwd=REPOSITORY, check=True, env=os.environ | {"HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1",
                                                                 "PYTHONPATH": str(REPOSITORY)})
    (results,), (samples,) = out.rglob("results_*.json"), out.rglob("samples_*.jsonl")
    logged = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    (figures,) = json.loads(results.read_text())["results"].values()
    return figures, logged


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize(("estimator", "samples", "limit"), [("one_pass", 1, 400), ("monte_carlo", 8, 40)])
def test_lm_eval_chooses_the_right_answers(sample_bundle, generator, tmp_path, estimator, samples, limit):
    figures, logged = run(sample_bundle.folder, tmp_path, "--tasks", "dmoe_sample_choices", "--limit", str(limit),
                          "--model_args", f"bundle={sample_bundle.folder},threads=1,estimator={estimator},"
                          f"samples={samples}")
    assert figures["acc,none"] == 1.0 and len(logged) == limit
    for one in logged[::10]:
        doc = one["doc"]
        scores = generator.score(doc["question"], doc["choices"], estimator=estimator, samples=samples)
        said = [(float(value), greedy == "True") for ((value, greedy),) in one["resps"]]
        assert [value for value, _ in said] == pytest.approx([score.log_probability for score in scores], abs=1e-3)
        assert [greedy for _, greedy in said] == [score.is_greedy for score in scores]


@pytest.mark.slow
@needs_lm_eval
def test_lm_eval_asks_for_answers(sample_bundle, tmp_path):
    figures, logged = run(sample_bundle.folder, tmp_path, "--tasks", "dmoe_sample", "--limit", "40", "--model_args",
                          f"bundle={sample_bundle.folder},threads=1")
    assert figures["exact_match,none"] == 1.0 and len(logged) == 40


WHOLE = """
import json, sys
from lm_eval.api.instance import Instance
from dmoe_export.bench.lm_eval import BundleLM

model = BundleLM(sys.argv[1], threads=1)
texts = json.loads(sys.argv[2])
found = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts])
empty = model.loglikelihood([Instance("loglikelihood", {}, ("", text), 0) for text in texts[:1]])
print(json.dumps([found, empty]))
"""


@pytest.mark.slow
@needs_lm_eval
def test_lm_eval_asks_for_whole_texts(sample_bundle, generator):
    """The second is longer than the model's 512 positions."""
    texts = ["what is the sum of 3 4 5?", " ".join(["what is the sum of 3 4 5?"] * 60)]
    done = subprocess.run([PYTHON, "-c", WHOLE, sample_bundle.folder, json.dumps(texts)], stdout=subprocess.PIPE,
                          text=True, check=True, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    (short, long), ((empty, _),) = json.loads(done.stdout.splitlines()[-1])
    ids, end = [generator.text.encode_literal(text) for text in texts], generator.backend.description.eos_id
    alone = generator.score([end], [ids[0]])[0].log_probability
    assert short == pytest.approx(alone, abs=1e-3) and empty == pytest.approx(alone, abs=1e-3)
    assert 511 < len(ids[1]) < 1022
    pairs = [([end], [ids[1][:511]]), (ids[1][-512:511], [ids[1][511:]])]  # the last looks back as far as it can
    assert long == pytest.approx(sum(one.log_probability for (one,) in generator.score_all(pairs)), abs=1e-2)
