"""`deploy kubernetes`: manifests hold against Kubernetes' own schemas, and a server comes up with their arguments."""

from __future__ import annotations

import copy
import http.client
import re
import shlex
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner
from conftest import SAMPLE
from serving import serving

from dmoe_export.bundle.reader import open_bundle
from dmoe_export.cli import deploy_kubernetes, main
from dmoe_export.deploy.kubernetes import LEAVE_SECONDS, Servers, manifests, pod_memory, start_seconds
from dmoe_export.deploy.kubernetes_names import check_name, name_of
from dmoe_export.errors import RequestError
from dmoe_export.serving import opening

WRITTEN = Path(__file__).parents[2] / "samples" / "deploy" / "kubernetes.yaml"
VERSIONS = ("1.30", "1.37")  # the first with the preStop hook's sleep by default, the last that the checker has
WISHES = {
    "the least": [],
    "replicas, keys": ["--replicas", "3", "--key-secret", "dmoe-keys", "--namespace", "models"],
    "autoscaling": ["--replicas", "2", "--max-replicas", "6", "--allowed-host", "models.example.org"],
    "GPU": ["--gpus", "1", "--max-replicas", "4", "--image", "registry.example.org/a/b:1@sha256:00", "--cpus", "4"],
    "in the image": ["--in-image", "--folder", "a/b c.bundle", "--model", "q: $(x) y", "--timeout", "30",
                     "--prefix-cache", "1M", "--expert-budget", "50%"],
}


@pytest.fixture(scope="module")
def bundle(exported, tmp_path_factory):
    """The sample as README's first command makes it, under its name."""
    link = tmp_path_factory.mktemp("user") / "sample.bundle"
    link.symlink_to(exported(SAMPLE).folder)
    return link


def run(*words):
    return CliRunner().invoke(main, ["deploy", "kubernetes", *map(str, words)], prog_name="dmoe-export")


def made(bundle, *words):
    """What the verb writes, by kind."""
    result = run(bundle, *words)
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(result.stdout)}


def container(documents):
    return documents["Deployment"]["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("wish", WISHES)
def test_manifests_hold_against_the_schemas(bundle, wish):
    documents = made(bundle, *WISHES[wish])
    for version in VERSIONS:
        for document in documents.values():
            assert kubernetes_validate.validate(document, version, strict=True) == version


@pytest.mark.parametrize(("kind", "path", "value"), [
    ("Deployment", ("spec", "template", "spec", "containers", 0, "readinesProbe"), {}),
    ("Deployment", ("spec", "template", "spec", "containers", 0, "lifecycle", "preStop", "sleep", "seconds"), "ten"),
    ("Deployment", ("spec", "template", "spec", "terminationGracePeriodSeconds"), "630s"),
    ("Service", ("spec", "ports", 0, "port"), None),
    ("PodDisruptionBudget", ("spec", "maxUnavailable"), [1]),
    ("HorizontalPodAutoscaler", ("spec", "metrics", 0, "type"), 1),
])
def test_the_checker_finds_what_is_wrong(bundle, kind, path, value):
    wrong = copy.deepcopy(made(bundle, *WISHES["autoscaling"])[kind])
    place = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("wish", WISHES)
def test_what_no_schema_knows(bundle, wish):
    """What refers to something in the manifests finds it there, and times fit."""
    documents = made(bundle, *WISHES[wish])
    spec = documents["Deployment"]["spec"]
    pod, one = spec["template"]["spec"], container(documents)
    labels = spec["template"]["metadata"]["labels"].items()
    for selector in (spec["selector"]["matchLabels"], documents["Service"]["spec"]["selector"],
                     *(documents[kind]["spec"]["selector"]["matchLabels"] for kind in ("PodDisruptionBudget",)
                       if kind in documents)):
        assert selector and selector.items() <= labels
    assert {mount["name"] for mount in one["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    ports = {port["name"] for port in one["ports"]}
    asked = [one[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {get["port"] for get in asked} | {documents["Service"]["spec"]["ports"][0]["targetPort"]} == ports
    given = dict(re.fullmatch(r"--([\w-]+)=(.*)", word).groups() for word in one["args"][2:])
    assert pod["terminationGracePeriodSeconds"] > int(given["drain-seconds"]) + LEAVE_SECONDS
    assert int(given["drain-seconds"]) >= int(given["timeout"])  # a rolling update cuts no request
    start = one["startupProbe"]
    assert start["failureThreshold"] * start["periodSeconds"] < spec["progressDeadlineSeconds"]
    assert one["resources"]["limits"] == one["resources"]["requests"]  # so that memory is the pod's own
    assert ("nvidia.com/gpu" in one["resources"]["limits"]) == (wish == "GPU") == ("tolerations" in pod)
    assert one["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                      "capabilities": {"drop": ["ALL"]}}
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    scaler = documents.get("HorizontalPodAutoscaler")
    assert ("replicas" in spec) != (scaler is not None)
    if scaler:
        assert scaler["spec"]["scaleTargetRef"]["name"] == documents["Deployment"]["metadata"]["name"]


def test_where_there_are_keys_nothing_is_open(bundle):
    documents = made(bundle, *WISHES["replicas, keys"])
    assert "annotations" not in documents["Deployment"]["spec"]["template"]["metadata"]  # Prometheus would get 401
    assert not any("--allowed-host" in word for word in container(documents)["args"])
    assert "--api-key-file=/etc/dmoe-export/keys" in container(documents)["args"]
    assert {document["metadata"]["namespace"] for document in documents.values()} == {"models"}
    assert "No key is asked for" in run(bundle).stdout and "No key" not in run(bundle, "--key-secret", "k").stdout


def test_the_sample_is_what_its_first_line_makes(bundle, monkeypatch):
    monkeypatch.chdir(bundle.parent)
    command = shlex.split(WRITTEN.read_text().partition("\n")[0].removeprefix("# Made by: "))
    assert command[:3] == ["dmoe-export", "deploy", "kubernetes"]
    out = Path(command[command.index("--out") + 1])
    result = CliRunner().invoke(main, command[1:], prog_name="dmoe-export")
    assert result.exit_code == 0 and result.stderr.startswith(f"{out}: Service, Deployment and PodDisr")
    assert out.read_text() == WRITTEN.read_text(), f"make it again: {shlex.join(command)} --force"
    again = CliRunner().invoke(main, command[1:], prog_name="dmoe-export")
    assert again.exit_code == 2 and again.stderr.endswith("exists already; choose another --out or add --force.\n")


def local(words, bundle, tmp_path, namespace="models"):
    """Arguments as the kubelet gives them, with this machine's paths and its port."""
    keys = tmp_path / "..data" / "keys"  # as a Secret's volume: links to links
    keys.parent.mkdir()
    keys.write_text("first-key\n")
    (tmp_path / "keys").symlink_to(Path("..data") / "keys")
    told = []
    for word in words:
        word = re.sub(r"\$(\$|\(NAMESPACE\))", lambda found: "$" if found[1] == "$" else namespace, word)
        told.append(word.replace("/bundles/sample.bundle", str(bundle)).replace("/etc/dmoe-export", str(tmp_path)))
    assert told[0] == "serve"
    return [word for word in told[1:] if not word.startswith("--port=")]


def test_a_server_comes_up_with_the_arguments(bundle, tmp_path):
    documents = made(bundle, "--max-replicas", "2", "--model", "cost: 5$ $(NAMESPACE)", "--max-batch", "2",
                     "--allowed-host", "models.example.org")
    one = container(documents)
    with serving(*local(one["args"], bundle, tmp_path)) as served:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert served.ask("GET", one[probe]["httpGet"]["path"], host="10.1.2.3:8000")[0] == 200  # as the kubelet
        name = documents["Service"]["metadata"]["name"]
        for host in (name, f"{name}.models", f"{name}.models.svc", f"{name}.models.svc.cluster.local",
                     "models.example.org"):
            status, _, answer = served.ask("GET", "/v1/models", host=host)
            assert (status, answer["data"][0]["id"]) == (200, "cost: 5$ $(NAMESPACE)")
        assert served.ask("GET", "/v1/models", host=f"{name}.other.svc")[2]["error"]["code"] == "unknown_host"
        scraped = documents["Deployment"]["spec"]["template"]["metadata"]["annotations"]
        text = served.ask("GET", scraped["prometheus.io/path"], host="10.1.2.3:8000")[2]
        assert 'dmoe_requests_in_progress{model="cost' in text  # what an autoscaler with GPUs asks for
        # A connection kept until the server drains is told to end, so that the next one meets another replica.
        kept = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        slow = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        json_of, asked = {"content-type": "application/json"}, '{"model": "cost: 5$ $(NAMESPACE)", "prompt": "what"'
        slow.request("POST", "/v1/completions", asked + ', "max_tokens": 120, "eos_id": -1, "threshold": 1.0, '
                     '"stream": true}', json_of)
        begun = slow.getresponse()
        assert begun.read(1)
        kept.request("GET", "/health/ready")
        assert kept.getresponse().read() == b'{"status":"ready"}'
        served.process.terminate()
        while served.ask("GET", "/health/ready")[0] == 200:
            pass
        kept.request("POST", "/v1/completions", asked + "}", json_of)
        refused = kept.getresponse()
        assert refused.status == 503 and refused.headers["connection"] == "close" and refused.headers["retry-after"]
        assert begun.read().endswith(b"data: [DONE]\n\n")  # and what had begun ends
        assert served.process.wait(40) == 0


def test_keys_come_from_the_secrets_file(bundle, tmp_path):
    one = container(made(bundle, "--key-secret", "dmoe-keys"))
    with serving(*local(one["args"], bundle, tmp_path)) as served:
        assert served.ask("GET", one["readinessProbe"]["httpGet"]["path"])[0] == 200
        assert served.ask("GET", "/v1/models", host="any.name")[0] == 401
        assert served.ask("GET", "/v1/models", host="any.name", authorization="Bearer first-key")[0] == 200


@pytest.mark.parametrize(("words", "sentence"), [
    (["--name", "Big"], r"--name 'Big' is no name that Kubernetes takes: it must be 1 to 63 lower-case"),
    (["--name", "a" * 64], r"--name 'a+' is no name"),
    (["--namespace", "a.b"], r"--namespace 'a\.b' is no name"),
    (["--claim", "a_b"], r"--claim 'a_b' is no name"),
    (["--key-secret", "a/b"], r"--key-secret 'a/b' is no name"),
    (["--allowed-host", "a:80"], r"--allowed-host 'a:80' is no name"),
    (["--image", "a b"], r"--image 'a b' is no name"),
    (["--folder", "../x"], r"--folder '\.\./x' is no name"),
    (["--model", "a\nb"], r"Model name 'a\\nb' must have"),
    (["--in-image", "--claim", "a"], r"--claim 'a' and --in-image are two places"),
    (["--replicas", "3", "--max-replicas", "2"], r"--max-replicas 2 is less than --replicas 3"),
    (["--max-context", "513"], r"--max-context 513 is more than the 512 tokens"),
    (["--expert-budget", "lots"], r"'lots' is no size"),
    (["--prefix-cache", "25%"], r"--prefix-cache 25% is a share of a node's memory"),
    (["--expert-budget", "50%", "--gpus", "1"], r"--expert-budget 50% with --gpus needs an engine"),
    (["--gpus", "2"], r"2 is not in the range 0<=x<=1"),
    (["--expect-sha256", "0" * 64], r"sha256"),
])
def test_refused_in_one_sentence(bundle, words, sentence, tmp_path):
    result = run(bundle, *words, "--out", tmp_path / "a.yaml")
    assert result.exit_code == 2 and re.search(sentence, result.stderr) and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def changed(bundle, monkeypatch, **more):
    """The verb reads a manifest that differs in this."""
    manifest = open_bundle(bundle, "sizes").manifest.model_copy(update=more)
    monkeypatch.setattr(deploy_kubernetes, "open_bundle", lambda *_, **__: SimpleNamespace(manifest=manifest))


def test_a_model_that_keeps_no_prefixes_is_refused_here(bundle, monkeypatch):
    model = open_bundle(bundle, "sizes").manifest.model.model_copy(update={"attention": "full_canvas"})
    changed(bundle, monkeypatch, model=model)
    result = run(bundle, "--prefix-cache", "1M")
    assert result.exit_code == 2 and "attends to the whole canvas; leave prefix_cache out" in result.stderr


def test_what_serve_has_of_its_own_is_the_same_here():
    assert deploy_kubernetes._SLOTS == opening.USUAL_SLOTS


def test_names():
    assert name_of(Path("LLaDA2.0-mini.bundle")) == "llada2-0-mini"
    assert name_of(Path("a" * 62 + "-b.bundle")) == "a" * 62
    for none in ("2b.bundle", "---", "模型.bundle", ".bundle"):
        with pytest.raises(RequestError, match="gives no name for a Service"):
            name_of(Path(none))
    for kind, fine in (("object", "a.b-c"), ("folder", "a b/c.bundle"), ("image", "host:5000/a/b@sha256:ab"),
                       ("host", "a-b.c"), ("label", "0a")):
        assert check_name("--x", fine, kind) == fine
    for kind, wrong in (("object", ".a"), ("object", "a" * 254), ("folder", "/a"), ("folder", "a/../b"),
                        ("folder", "a/"), ("folder", "."), ("folder", "a\n"), ("image", "-a"), ("image", "a\n"),
                        ("host", ""), ("label", "a\n")):
        with pytest.raises(RequestError):
            check_name("--x", wrong, kind)


def test_sizes_and_times():
    assert pod_memory(1 << 30) == 1280 << 20 and pod_memory(1) == 64 << 20
    assert start_seconds(1) == 300 and start_seconds(int(32e9)) == 760
    large = Servers("a", "a", "a", "a", "onnxruntime", 1 << 30, int(600e9), 8)
    probe = container({one["kind"]: one for one in manifests(large)})["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 120 + 600e9 / 50e6


def test_without_pyyaml_one_sentence(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    result = run(bundle)
    assert result.exit_code == 3 and result.stderr.startswith("dmoe-export: Writing YAML needs yaml; run: pip install")


def test_manifests_of_the_page_hold_against_the_schemas():
    page = (WRITTEN.parents[2] / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^ *```yaml\n(.*?)^ *```", page, flags=re.DOTALL | re.MULTILINE)
    documents = list(yaml.safe_load_all(textwrap.dedent(block)))
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", "Pod"]
    for document in documents:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


def test_with_an_engine_its_limits_are_the_servers(bundle, monkeypatch):
    profile = SimpleNamespace(batch=[1, 1, 4], tokens=[1, 32, 32], past=[1, 64, 256])
    changed(bundle, monkeypatch, engines=[SimpleNamespace(profiles=[profile, profile], graph=None)])
    monkeypatch.setattr(deploy_kubernetes, "predict", lambda *_, **asked: SimpleNamespace(
        host_bytes=asked["max_batch"] << 30, compared="never compared", **asked))
    args = container(made(bundle, "--gpus", "1"))["args"]
    assert {"--backend=tensorrt", "--max-batch=4"} <= set(args) and not any("--threads" in word for word in args)
    said = run(bundle, "--gpus", "1").stdout
    assert "4.3 GB predicted for 4 answers of 256 tokens" in said and "were never compared.\n" in said
    assert re.search("--max-batch 5 is more than the 4 rows", run(bundle, "--gpus", 1, "--max-batch", 5).stderr)
    assert re.search("--max-context 257 is more than the 256", run(bundle, "--gpus", 1, "--max-context", 257).stderr)
    assert "--max-batch=8" in container(made(bundle))["args"]  # the processor has no such limit
