"""Bundles by their hub id: the manifest, then the files it lists, from one commit, into the hub's cache of links."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from processes import python_without

from dmoe_export.bundle.hub import resolve_bundle
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.checkpoint.hub import FILES, resolve_checkpoint
from dmoe_export.errors import BundleError, CheckpointError, InputError
from dmoe_export.hub import hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands for huggingface_hub: repositories are folders, a snapshot is a folder of links to blobs."""

    def __init__(self, cache: Path, **repositories: Path) -> None:
        self.cache, self.repositories = cache, {f"org/{name}": folder for name, folder in repositories.items()}
        self.calls: list[tuple[str, str | None]] = []

    def snapshot_download(self, name, revision, allow_patterns):
        self.calls.append((name, revision))
        if name not in self.repositories:
            raise ConnectionError("404: no such repository\nfurther lines")
        folder = self.repositories[name]
        snapshot = self.cache / name.replace("/", "--") / "snapshots" / COMMIT
        for file in (p for p in folder.rglob("*") if p.is_file()):
            path = file.relative_to(folder).as_posix()
            if any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns):
                blob = self.cache / name.replace("/", "--") / "blobs" / hashlib.sha256(path.encode()).hexdigest()
                blob.parent.mkdir(parents=True, exist_ok=True)
                (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, blob)
                if not (snapshot / path).exists():
                    (snapshot / path).symlink_to(os.path.relpath(blob, (snapshot / path).parent))
        return str(snapshot)


@pytest.fixture
def hub(tmp_path, tiny_bundle, tiny_checkpoint, monkeypatch):
    own = shutil.copytree(tiny_bundle.folder, tmp_path / "b")
    made = Hub(tmp_path / "cache", bundle=own, checkpoint=tiny_checkpoint)
    (own / "notes.txt").write_text("of no use to a bundle")
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return made


def test_a_bundle_is_fetched_by_its_manifest(hub, tiny_bundle):
    folder = resolve_bundle("org/bundle")
    opened = open_bundle(folder)
    assert opened.manifest == tiny_bundle.manifest and opened.denoiser_path.is_symlink()
    assert {p.name for p in folder.iterdir()} == {"manifest.json", *(entry.path for entry in opened.manifest.files)}
    assert hub.calls == [("org/bundle", None), ("org/bundle", COMMIT)]


def test_what_is_no_bundle_on_the_hub(hub):
    with pytest.raises(BundleError, match=r"org/checkpoint on the hub has no manifest\.json.* export org/checkpoint "):
        resolve_bundle(Path("org/checkpoint"))
    with pytest.raises(BundleError, match=r"org/none is no local bundle .*: 404: no such repository\. Run again"):
        resolve_bundle("org/none")
    (hub.repositories["org/bundle"] / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="not readable as a manifest"):
        resolve_bundle("org/bundle")


def test_a_file_that_is_listed_and_not_there_is_found(hub):
    next(hub.repositories["org/bundle"].glob("*.data")).unlink()
    with pytest.raises(BundleError, match=r"\.data"):
        open_bundle(resolve_bundle("org/bundle"))


def test_places_are_no_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for place in ("here", "missing", "here/missing", "./org/name", "../org/name", "/org/name", "a/b/c", "org/", "-o/x"):
        assert hub_id(place) is None and resolve_bundle(place) == Path(place)
    assert hub_id("org/Name-1.0_x") == hub_id(Path("org/Name-1.0_x")) == "org/Name-1.0_x"


def test_engines_are_not_built_into_the_cache(hub):
    from dmoe_export.cli.build import _fetched

    with pytest.raises(InputError, match="give --out"):
        _fetched("org/bundle", None, dry_run=False)
    assert Path(_fetched("org/bundle", Path("out"), dry_run=False)).name == COMMIT
    assert _fetched("org/checkpoint", None, dry_run=False) == "org/checkpoint"


def test_all_that_the_export_reads_is_fetched(hub, tmp_path):
    wanted = ["config.json", "generation_config.json", "a-1.safetensors", "model.safetensors.index.json",
              "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
              "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
              "additional_chat_templates/x.jinja", "quantize_config.json", "hf_quant_config.json", "LICENSE",
              "LICENSE.txt", "README.md"]
    for name in (*wanted, "pytorch_model.bin", "modeling.py", "model.gguf", "training_args.bin"):
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_text(name)
    hub.repositories["org/all"] = tmp_path / "repo"
    folder = resolve_checkpoint("org/all")
    assert sorted(wanted) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert len(FILES) == len(set(FILES))
    with pytest.raises(CheckpointError, match=r"org/none is no local folder .*no such repository"):
        resolve_checkpoint("org/none")


def test_without_the_hub_library_one_sentence_says_what_to_install():
    for verb in ("inspect", "generate"):
        prompt = ["--prompt-ids", "1"] if verb == "generate" else []
        result = python_without(f"from dmoe_export.cli import main\nmain([{verb!r}, 'org/bundle', *{prompt!r}])")
        assert result.returncode == 3 and result.stderr.count("\n") == 1
        assert "org/bundle is no local folder" in result.stderr and "pip install 'huggingface_hub>=" in result.stderr


class _Server(BaseHTTPRequestHandler):
    """As much of a hub's protocol as fetching a repository takes: its list of files, and each of them."""

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        folder: Path = self.server.folder  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        names = [p.name for p in folder.iterdir()]
        if path.startswith("/api/models/org/bundle/tree/"):
            return self._send(json.dumps([{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": n}
                                          for n in names]).encode())
        if path.startswith("/api/models/org/bundle"):
            return self._send(json.dumps({"_id": "1", "id": "org/bundle", "sha": COMMIT, "private": False, "tags": [],
                                          "downloads": 0, "likes": 0,
                                          "siblings": [{"rfilename": name} for name in names]}).encode())
        file = folder / path.rpartition("/")[2]
        return self._send(file.read_bytes()) if file.is_file() else self.send_error(404)

    def _send(self, body: bytes):
        self.send_response(200)
        for name, value in (("Content-Length", len(body)), ("ETag", f'"{hashlib.sha256(body).hexdigest()}"'),
                            ("X-Repo-Commit", COMMIT), ("Content-Type", "application/json")):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def test_an_answer_from_a_hub(tiny_bundle, tmp_path):
    """The hub library itself, against a server on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.folder = tiny_bundle.folder  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
                    "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "dmoe_export", "generate", "org/bundle", "--prompt-ids", "1,2,3", "--json",
               "--max-new-tokens", "4", "--eos-id", "-1", "--backend", "onnxruntime"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200)
    finally:
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["token_ids"]) == 4
    assert list((tmp_path / "home").rglob(f"snapshots/{COMMIT}/manifest.json"))
