"""generation_config.json: which ids end an answer, and the decode defaults that travel with a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dmoe_export import Generator
from dmoe_export.bundle.reader import Bundle
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.checkpoint.generation_config import GenerationConfig, read_generation_config
from dmoe_export.checkpoint.llada2_moe import LLADA2_MOE
from dmoe_export.checkpoint.synthetic import GEOMETRIES
from dmoe_export.cli import main
from dmoe_export.decoding.canvas_options import check_canvas_options
from dmoe_export.decoding.defaults import Defaults
from dmoe_export.decoding.settings import CANVAS_DEFAULTS, OPTIONS, DecodeSettings
from dmoe_export.description import CanvasDescription, RoutingDescription
from dmoe_export.errors import BundleError, CheckpointError

FILE = Path("generation_config.json")


TINY = LLADA2_MOE.describe(GEOMETRIES["tiny"], Path("config.json"))  # of 256 positions


def defaults(values, family="llada2_moe"):
    return GenerationConfig(FILE, values).decode_defaults(TINY.model_copy(update={"family": family}))


@pytest.mark.parametrize(("values", "want"), [
    ({}, {}), ({"max_new_tokens": 255}, {"max_new_tokens": 255}), ({"temperature": 0.6, "top_k": 20, "top_p": 0.9}, {}),
    ({"do_sample": False, "temperature": 0.6}, {}), ({"do_sample": None, "temperature": None, "top_k": None}, {}),
    ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
     {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
    ({"do_sample": True}, {"temperature": 1.0, "top_k": 50, "top_p": 1.0}),  # transformers' own defaults
    ({"do_sample": True, "temperature": 1, "top_k": None, "top_p": None},
     {"temperature": 1.0, "top_k": 0, "top_p": 1.0})])
def test_what_is_taken_over(values, want):
    found, said = defaults(values)
    assert found == want and said == []
    DecodeSettings(**found)  # every request can have them


@pytest.mark.parametrize(("values", "want"), [
    ({"temperature": 0.0, "top_p": 0.9}, {}), ({"top_p": 0.9}, {}),
    ({"temperature": 0.2, "top_p": 0.95}, {"temperature": 0.2, "top_k": 0, "top_p": 0.95})])
def test_dream_samples_by_its_temperature(values, want):
    assert defaults(values, "dream") == (want, [])


def test_what_is_left_out_is_said_and_what_is_bookkeeping_is_not():
    quiet = {"_from_model_config": True, "transformers_version": "5.0", "use_cache": True, "max_length": 20,
             "num_beams": 1, "repetition_penalty": 1.0, "bos_token_id": 1, "pad_token_id": 2, "min_length": 0,
             "eos_token_id": [3], "suppress_tokens": None, "early_stopping": False, "typical_p": 1.0}
    assert defaults(quiet) == ({}, [])
    _, said = defaults(quiet | {"repetition_penalty": 1.2, "max_length": 2048, "stop_strings": ["\n"], "new": "x"})
    assert said == ["generation_config.json sets max_length 2048, repetition_penalty 1.2, stop_strings ['\\n'], "
                    "new 'x', which no request can have here and is not taken over, so answers can differ from those "
                    "of transformers' generate."]
    found, said = defaults({"max_new_tokens": 256})  # as many as the model has positions
    assert found == {} and "sets max_new_tokens 256, which no request can have" in said[0]


@pytest.mark.parametrize(("values", "sentence"), [
    ({"max_new_tokens": 0}, "max_new_tokens is 0, it must be positive"), ({"max_new_tokens": "9"}, "expected int"),
    ({"max_new_tokens": 2.5}, "expected int"), ({"temperature": -1}, "temperature is -1.0, it must be 0 or more"),
    ({"top_p": 0}, "top_p is 0.0, it must be above 0"), ({"top_p": 1.5, "do_sample": True}, "top_p is 1.5"),
    ({"top_k": -1}, "top_k is -1, it must be 0 or more"), ({"do_sample": "yes"}, "do_sample is 'yes', expected bool"),
    ({"temperature": float("inf")}, "temperature is inf, which is not a finite number")])
def test_bad_values(values, sentence):
    with pytest.raises(CheckpointError, match=f"^generation_config.json: .*{sentence}"):
        defaults(values)


CANVAS = TINY.model_copy(update={"attention": "canvas", "mask_id": None, "max_positions": 1024,
                                 "canvas": CanvasDescription(length=8, conditioning_width=4)})
PUBLISHED = {"max_new_tokens": 300, "max_denoising_steps": 24, "t_min": 0.3, "t_max": 0.9, "stability_threshold": 2,
             "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.25},
             "confidence_threshold": 0.01}
TAKEN = {"max_new_tokens": 300, "steps": 24, "entropy_bound": 0.25, "t_min": 0.3, "t_max": 0.9,
         "stability_threshold": 2, "confidence_threshold": 0.01}
EARLIER = {"linear_temperature_schedule_config": {"_cls_name": "LinearTemperatureScheduleConfig", "t_min": 0.3,
                                                  "t_max": 0.9},
           "diffusion_stopping_config": {"stability_threshold": 2, "confidence_threshold": 0.01}}
BUILT_IN = {"max_new_tokens": 256, "steps": 48}


@pytest.mark.parametrize(("values", "want"), [
    (PUBLISHED, TAKEN), ({}, BUILT_IN), ({"t_min": 0, "pad_token_id": 0, "top_k": None}, BUILT_IN | {"t_min": 0.0}),
    ({name: PUBLISHED[name] for name in ("max_new_tokens", "max_denoising_steps", "sampler_config")} | EARLIER, TAKEN)])
def test_a_canvas_has_fields_of_its_own(values, want):
    found, said = GenerationConfig(FILE, values).decode_defaults(CANVAS)
    assert found == want and said == []
    check_canvas_options(DecodeSettings(**found), CANVAS)
    assert "max_new_tokens" not in GenerationConfig(FILE, {}).decode_defaults(
        CANVAS.model_copy(update={"max_positions": 256}))[0]


@pytest.mark.parametrize("left", [
    {"sampler_config": {"_cls_name": "AutoRegressiveEulerSamplerConfig", "entropy_bound": 0.1}},
    {"sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1, "more": 1}},
    {"sampler_config": {"entropy_bound": 0.1}}, {"sampler_config": "x"}, {"diffusion_stopping_config": {"patience": 2}},
    {"linear_temperature_schedule_config": {"t_min": 0.1, "shape": "cosine"}}, {"do_sample": True}, {"top_k": 64},
    {"t_min": 0.4, "linear_temperature_schedule_config": {"t_min": 0.1, "t_max": 0.2}}],
    ids=lambda left: str(left)[:60])
def test_what_is_not_known_of_a_canvas_is_said(left):
    found, said = GenerationConfig(FILE, left).decode_defaults(CANVAS)
    assert found == BUILT_IN | ({"t_min": 0.4} if "t_min" in left else {})
    assert len(said) == 1 and f"sets {[*left][-1]} " in said[0]


@pytest.mark.parametrize(("values", "sentence"), [
    ({"max_denoising_steps": 0}, "max_denoising_steps is 0, it must be positive"),
    ({"t_min": -0.1}, "t_min is -0.1, it must be 0 or more"), ({"stability_threshold": 1.5}, "expected int"),
    ({"t_min": 0.9}, "t_max is 0.8, it must be above 0 and at least t_min, which is 0.9"),
    ({"t_min": 0, "t_max": 0}, "t_max is 0.0, it must be above 0"),
    ({"sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": -1}},
     "sampler_config.entropy_bound is -1.0, it must be 0 or more"),
    ({"diffusion_stopping_config": {"stability_threshold": "2"}},
     "field diffusion_stopping_config.stability_threshold is '2', expected int")])
def test_bad_values_of_a_canvas(values, sentence):
    with pytest.raises(CheckpointError, match=f"^generation_config.json: .*{sentence}"):
        GenerationConfig(FILE, values).decode_defaults(CANVAS)


def test_a_bundle_that_no_request_could_ask_is_refused():
    for model, name, value in ((TINY, "t_max", 0.8), (CANVAS, "threshold", 0.9), (CANVAS, "t_max", 0.3)):
        bundle = SimpleNamespace(folder="b", manifest=SimpleNamespace(
            decode_defaults={name: value}, presets={}, model=model, denoiser=SimpleNamespace(opens_blocks=False),
            routing=RoutingDescription.default(model.moe)))
        with pytest.raises(BundleError, match=f"^The decode_defaults of b cannot be used; export again: {name} "):
            Defaults(bundle)


def test_ends_are_those_of_both_files():
    d = with_ends({"eos_token_id": [3, 94, 4]})
    assert d.eos_ids == (94, 3, 4) and d.eos_id == 94  # config.json's first
    assert with_ends({"eos_token_id": 5}).eos_ids == (94, 5)
    assert with_ends({"mask_token_id": 95}).eos_ids == with_ends({}).eos_ids == (94,)
    only_there = GenerationConfig(FILE, {"eos_token_id": [7, 8]}).complete(GEOMETRIES["tiny"] | {"eos_token_id": None})
    assert only_there["eos_token_id"] == [7, 8]
    with pytest.raises(CheckpointError, match=r"^generation_config.json: eos_token_id 96 is outside the vocabulary of"):
        GenerationConfig(FILE, {"eos_token_id": [7, 96]}).complete({"vocab_size": 96})
    for values, sentence in (({"eos_token_id": 96}, "eos_token_id 96 is outside the vocabulary of 96"),
                             ({"eos_token_id": [94, 95]}, "eos_token_id 95 is config.json's mask"),
                             ({"eos_token_id": "x"}, "expected a token id or a list"),
                             ({"mask_token_id": 3}, "mask_token_id is 3, but config.json's is 95; keep one")):
        with pytest.raises(CheckpointError, match=f"^generation_config.json: .*{sentence}"):
            with_ends(values)


def with_ends(values):
    """The description of the tiny model, and of such a file beside it."""
    return GenerationConfig(FILE, values).add_eos(TINY)


def test_the_file_is_optional_and_read_strictly(tmp_path, tiny_checkpoint):
    assert read_generation_config(tmp_path, {}).values == {}
    own = {"do_sample": True, "temperature": 0.5, "hidden_size": 4}  # transformers 4 keeps such fields in config.json
    found = read_generation_config(tmp_path, own)
    assert found.source == tmp_path / "config.json" and found.decode_defaults(TINY)[0]["temperature"] == 0.5
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_generation_config(tmp_path, own).values == {}
    no_object = "holds no JSON object"
    for text, sentence in (("{", "cannot be read as JSON"), ("[]", no_object), ("NaN", no_object)):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"generation_config.json {sentence}"):
            read_generation_config(tmp_path, {})
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "c")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": float("nan")}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: field temperature is nan"):
        Checkpoint(folder)


@pytest.fixture(scope="module")
def sampling_bundle(tiny_checkpoint, tmp_path_factory):
    """A bundle of a checkpoint that wants sampling, short answers and two more ends; what the export printed."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("sampling") / "c")
    (folder / "generation_config.json").write_text(json.dumps(
        {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 9, "eos_token_id": [94, 90], "alg": "x"}))
    out = folder.parent / "b"
    result = CliRunner().invoke(main, ["export", str(folder), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out, result.stderr


def test_defaults_travel_and_give_way(sampling_bundle, tiny_bundle):
    out, said = sampling_bundle
    assert "generation_config.json sets alg 'x', which no request can have here" in said
    generator = Generator.open(out, threads=1)
    manifest = generator.bundle.manifest
    assert manifest.decode_defaults == {"max_new_tokens": 9, "temperature": 1.5, "top_k": 0, "top_p": 1.0}
    assert manifest.decode_defaults.keys() == {
        one.name for one in OPTIONS.values() if one.told.of_bundle} - {"steps", *CANVAS_DEFAULTS}
    assert manifest.model.eos_ids == (94, 90)
    assert manifest.checkpoint.identity == tiny_bundle.manifest.checkpoint.identity  # what ends answers is no model
    answers = [generator.generate([[1, 2, 3]], seed=seed, eos_id=-1)[0].token_ids for seed in (1, 2, 1)]
    assert len(answers[0]) == 9 and answers[0] == answers[2] != answers[1]
    greedy = generator.generate([[1, 2, 3]], temperature=0, max_new_tokens=20, eos_id=-1, steps=None)[0].token_ids
    assert greedy == Generator.open(tiny_bundle.folder, threads=1).generate(
        [[1, 2, 3]], max_new_tokens=20, eos_id=-1)[0].token_ids
    shown = CliRunner().invoke(main, ["inspect", str(out)]).stdout
    assert "max_new_tokens 9, temperature 1.5, top_k 0, top_p 1.0" in " ".join(shown.split()).replace(" │ │ ", " ")
    assert "94, 90" in shown and "Warning of the export:" in shown
    command = ["generate", str(out), "--prompt-ids", "1,2,3", "--json", "--eos-id", "-1"]
    for options, want in (([], 9), (["--max-new-tokens", "4"], 4)):
        result = CliRunner().invoke(main, [*command, *options])
        answer = json.loads(result.stdout)
        assert len(answer["token_ids"]) == want and ("max_new_tokens" in answer["decode_defaults"]) == (not options)
    plain = CliRunner().invoke(main, ["generate", str(out), "--prompt-ids", "1", "--temperature", "0"]).stderr
    assert "; by the bundle's decode defaults: max_new_tokens 9, top_k 0, top_p 1.0]" in plain


@pytest.mark.parametrize(("said", "reason"), [
    ({"speed": 2}, "speed is no setting of a request"), ({"routing": 1}, "routing is no setting"),
    ({"coreset_size": 3}, "coreset_size has no meaning in this bundle"),
    ({"temperature": -1.0}, "temperature is -1.0, it must be"), ({"steps": 1.5}, "steps is 1.5, it must be")])
def test_bad_defaults_of_a_bundle(tiny_bundle, said, reason):
    changed = Bundle(tiny_bundle.folder, tiny_bundle.manifest.model_copy(update={"decode_defaults": said}))
    with pytest.raises(BundleError, match=f"The decode_defaults of .* cannot be used; export again: {reason}"):
        Generator(changed, backend=None)
