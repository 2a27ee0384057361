"""lm-eval as a client: all held-out questions of the sample through chat completions (`make lm-eval`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import SAMPLE
from serving import serving

from dmoe_export.generator import Generator

REPOSITORY = Path(__file__).parents[2]
LM_EVAL = REPOSITORY / ".venv-lm-eval" / "bin" / "lm_eval"


@pytest.mark.slow
@pytest.mark.skipif(not LM_EVAL.exists(), reason="lm-eval is not installed: make lm-eval")
def test_every_held_out_question_is_answered_as_offline(sample_bundle, tmp_path):
    rows = [json.loads(line) for line in (SAMPLE / "held_out.jsonl").read_text().splitlines()]
    with Generator.open(sample_bundle.folder, threads=1) as generator:
        offline = [one.text for one in generator.generate([row["question"] for row in rows], max_new_tokens=64)]
    with serving(sample_bundle.folder, "--name", "sample", "--threads", 1) as one:
        where = f"model=sample,base_url={one.url}/v1/chat/completions,num_concurrent=8,tokenized_requests=False"
        subprocess.run([LM_EVAL, "run", "--model", "local-chat-completions", "--model_args", where, "--tasks",
                        "dmoe_sample", "--include_path", "samples/lm_eval", "--apply_chat_template", "--log_samples",
                        "--output_path", tmp_path], cwd=REPOSITORY, check=True,
                       env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"})
    (found,) = tmp_path.rglob("samples_dmoe_sample_*.jsonl")
    samples = sorted((json.loads(line) for line in found.read_text().splitlines()), key=lambda one: one["doc_id"])
    assert [one["resps"][0][0] for one in samples] == offline and len(samples) == 400
    (results,) = tmp_path.rglob("results_*.json")
    score = json.loads(results.read_text())["results"]["dmoe_sample"]["exact_match,none"]
    assert score == sum(text == row["answer"] for text, row in zip(offline, rows, strict=True)) / 400 == 1.0
