"""`deploy ray`: the file that Ray Serve takes; Ray's own schema takes it in tests/serving/test_ray_serve.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from processes import python_without

from dmoe_export.cli import main
from dmoe_export.cli.deploy_ray import ray
from dmoe_export.serving.ray.settings import Settings

REPOSITORY = Path(__file__).parents[2]


def run(*words):
    return CliRunner().invoke(main, ["deploy", "ray", *map(str, words)])


def written(*words):
    result = run(*words)
    assert result.exit_code == 0, result.output
    return yaml.safe_load(result.stdout)


def test_one_bundle_answers_below_the_root(tiny_bundle):
    folder = str(tiny_bundle.folder)
    assert written(folder, "--name", "tiny", "--replicas", 2, "--gpus", 1, "--port", 9000) == {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 9000, "keep_alive_timeout_s": 30},
        "applications": [{"name": "tiny", "route_prefix": "/", "import_path": "dmoe_export.serving.ray:app",
                          "args": {"bundle": folder, "name": "tiny", "replicas": 2, "gpus": 1.0}}]}


def test_several_bundles_are_several_applications(tiny_bundle, tmp_path):
    out = tmp_path / "serve.yaml"
    result = run(tiny_bundle.folder, tiny_bundle.folder, "--name", "a", "--name", "b", "--out", out, "--allowed-host",
                 "models.example.org", "--verify", "sizes", "--trusted-key", "key.pem", "--log-prompts")
    assert (result.exit_code, result.stdout) == (0, "") and f"serve run {out}" in result.stderr
    found = yaml.safe_load(out.read_text())
    assert [(one["name"], one["route_prefix"]) for one in found["applications"]] == [("a", "/a"), ("b", "/b")]
    for one in found["applications"]:
        assert Settings(**one["args"]).name == one["name"]
        assert {key: one["args"][key] for key in ("allowed_hosts", "verify", "trusted_key", "log_prompts")} == {
            "allowed_hosts": ["models.example.org"], "verify": "sizes", "trusted_key": "key.pem", "log_prompts": True}
    again = run(tiny_bundle.folder, "--out", out)
    assert again.exit_code == 2 and "exists already" in again.stderr
    assert run(tiny_bundle.folder, "--out", out, "--force").exit_code == 0


def test_every_setting_has_its_option_and_its_default(tiny_bundle):
    assert {param.name for param in ray.params} >= Settings.model_fields.keys() - {"bundle", "name"}
    (application,) = written(tiny_bundle.folder)["applications"]
    assert application["args"].keys() == {"bundle", "name"}  # an option's default is the setting's


@pytest.mark.parametrize("words, said", [
    (("--replicas", 3, "--max-replicas", 2), "Settings of tiny contradict: replicas is 3, it must be between"),
    (("--min-replicas", 2), "Settings of tiny contradict: min_replicas and target_requests belong to max_replicas"),
])
def test_settings_that_contradict_are_refused(tiny_bundle, words, said):
    result = run(tiny_bundle.folder, "--name", "tiny", *words)
    assert result.exit_code == 2 and said in result.stderr and result.stdout == ""


def test_names_that_are_no_part_of_a_path(tiny_bundle):
    result = run(tiny_bundle.folder, tiny_bundle.folder, "--name", "a/b", "--name", "c")
    assert result.exit_code == 2 and "Model name a/b cannot stand in a path" in result.stderr
    assert run(tiny_bundle.folder, "--name", "a/b").exit_code == 0


def test_a_bundle_of_this_machine_is_looked_at_and_another_is_not(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 2 and "is no bundle" in result.stderr
    result = run(tmp_path / "elsewhere.bundle")
    assert result.exit_code == 0 and "is not on this machine" in result.stderr
    assert yaml.safe_load(result.stdout)["applications"][0]["args"]["bundle"] == str(tmp_path / "elsewhere.bundle")


def test_the_file_needs_neither_ray_nor_a_server(tiny_bundle):
    code = "from dmoe_export.cli import main\nmain(['deploy', 'ray', sys.argv[1]])"
    result = python_without(code, tiny_bundle.folder, blocked=("ray", "fastapi", "uvicorn", "onnxruntime"))
    assert result.returncode == 0 and "import_path" in result.stdout, result.stderr


def test_the_page_tells_every_setting():
    page = (REPOSITORY / "docs" / "ray.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for name, field in Settings.model_fields.items():
        words = field.json_schema_extra
        assert name in rows, f"| `{name}` | {field.description} | {words['shown'] or field.default} |"
        assert f"| {field.description} |" in rows[name], f"| `{name}` | {field.description} |"
