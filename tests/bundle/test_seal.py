"""The seal: the manifest's sha256 and a signature over it, compared with the very bytes that are parsed."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import python_without

from dmoe_export.bundle import reader
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.bundle.seal import SIGNATURE_NAME, manifest_sha256
from dmoe_export.cli import main
from dmoe_export.errors import BundleError, RequestError
from dmoe_export.extras import pip_install
from dmoe_export.generator import Generator


@pytest.fixture
def copy(tiny_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Path]:
    """PEM files: ours.pem and other.pem (Ed25519, public), private.pem (of ours), rsa.pem (another kind)."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
    folder, pem = tmp_path_factory.mktemp("keys"), form.Encoding.PEM
    private = {"ours": ed25519.Ed25519PrivateKey.generate(), "other": ed25519.Ed25519PrivateKey.generate(),
               "rsa": rsa.generate_private_key(65537, 2048)}
    files = {name: folder / f"{name}.pem" for name in (*private, "private")}
    for name, key in private.items():
        files[name].write_bytes(key.public_key().public_bytes(pem, form.PublicFormat.SubjectPublicKeyInfo))
    files["private"].write_bytes(private["ours"].private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption()))
    return files


def sign(bundle: Path, keys: dict[str, Path]) -> bytes:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    key = load_pem_private_key(keys["private"].read_bytes(), None)
    signature = key.sign((bundle / "manifest.json").read_bytes())
    (bundle / SIGNATURE_NAME).write_bytes(signature)
    return signature


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))


def test_the_seal_is_printed_by_export_and_inspect(tiny_checkpoint, tmp_path):
    found = run("export", tiny_checkpoint, "--out", tmp_path / "b")
    seal = hashlib.sha256((tmp_path / "b" / "manifest.json").read_bytes()).hexdigest()
    assert seal in found.stdout and manifest_sha256(tmp_path / "b") == seal
    assert seal in "".join(run("inspect", tmp_path / "b").stdout.split())
    assert json.loads(run("inspect", tmp_path / "b", "--json").stdout)["sha256"] == seal
    again = run("export", tiny_checkpoint, "--out", tmp_path / "b", "--force", "--json")
    assert json.loads(again.stdout)["sha256"] == manifest_sha256(tmp_path / "b")


@pytest.mark.parametrize("command", [
    ("inspect",), ("generate", "--prompt-ids", "1"), ("check",), ("build", "--dry-run"), ("bench", "step"),
    ("bench", "generate"), ("bench", "residency"), ("bench", "decode")], ids=" ".join)
def test_every_verb_refuses_another_manifest_before_it_reads_it(copy, command):
    seal = manifest_sha256(copy)
    (copy / "manifest.json").write_text("no JSON")
    found = run(*command, copy, "--expect-sha256", seal)
    assert found.exit_code == 2 and found.stderr.count("\n") == 1, found.output
    assert found.stderr.endswith(f"/manifest.json has sha256 {manifest_sha256(copy)}, not the expected {seal}; fetch "
                                 "the bundle again from who told you the sha256.\n")


def test_the_expected_sha256_opens(copy):
    seal = manifest_sha256(copy)
    assert open_bundle(copy, expect_sha256=seal.upper()).sha256 == seal
    assert Generator.open(copy, expect_sha256=seal).generate([[1, 2]], max_new_tokens=1)
    assert run("inspect", copy, "--expect-sha256", seal).exit_code == 0


@pytest.mark.parametrize("wrong", ["", "abc", "0" * 63, "0" * 65, "g" * 64, "٠" * 64, 0])
def test_what_is_no_sha256(copy, wrong):
    with pytest.raises(RequestError, match="give the 64 hexadecimal digits that export and inspect print"):
        open_bundle(copy, expect_sha256=wrong)


def test_sizes_alone_are_no_proof(copy):
    for seal in ({"expect_sha256": manifest_sha256(copy)}, {"trusted_key": "key.pem"}):
        with pytest.raises(RequestError, match="says nothing of a bundle's files with verify sizes; use verify full"):
            open_bundle(copy, "sizes", **seal)


def test_a_seal_without_a_bundle_is_not_ignored(tiny_checkpoint, tmp_path):
    seal = ("--expect-sha256", "0" * 64)
    found = run("bench", "step", "--geometry", "tiny", *seal)
    assert found.exit_code == 2 and "belong to a BUNDLE" in found.stderr
    pytest.importorskip("tensorrt_rtx")
    found = run("build", tiny_checkpoint, "--out", tmp_path / "b", *seal)
    assert found.exit_code == 2 and "is no bundle; --expect-sha256 and --trusted-key belong to one" in found.stderr
    assert not list(tmp_path.iterdir())


def test_the_bytes_that_are_compared_are_those_that_are_parsed(copy, monkeypatch):
    """A manifest that is replaced while the bundle is opened does not get in behind the seal."""
    seal, read, calls = manifest_sha256(copy), reader.read_regular, []

    def replaced(path, most):
        content = read(path, most)
        calls.append(path)
        manifest = json.loads(content)
        manifest["routing"]["reason"] = "replaced"
        path.write_text(json.dumps(manifest))
        return content
    monkeypatch.setattr(reader, "read_regular", replaced)
    assert open_bundle(copy, expect_sha256=seal).manifest.routing.reason != "replaced"
    assert calls == [copy / "manifest.json"]


def test_a_signature_opens_raw_and_in_base64(copy, keys):
    signature = sign(copy, keys)
    open_bundle(copy, trusted_key=keys["ours"])
    (copy / SIGNATURE_NAME).write_bytes(base64.encodebytes(signature))
    open_bundle(copy, trusted_key=str(keys["ours"]), expect_sha256=manifest_sha256(copy))
    assert run("generate", copy, "--prompt-ids", 1, "--max-new-tokens", 1, "--trusted-key", keys["ours"]).exit_code == 0


def test_one_changed_byte_anywhere_is_seen(copy, keys):
    """In the manifest by the signature, in a file by the manifest's hash, in the signature itself."""
    sign(copy, keys)
    for name in ("manifest.json", "experts.bin", SIGNATURE_NAME):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
        with pytest.raises(BundleError, match=r"is no signature of this manifest\.json|experts\.bin was changed"):
            open_bundle(copy, trusted_key=keys["ours"])
        (copy / name).write_bytes(content)
    open_bundle(copy, trusted_key=keys["ours"])


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"x" * 64, b"x" * 65, b"AAAA", b"=" * 88])
def test_what_is_no_signature(copy, keys, content):
    (copy / SIGNATURE_NAME).write_bytes(content)
    with pytest.raises(BundleError, match="is no signature of this"):
        open_bundle(copy, trusted_key=keys["ours"])


def test_a_signature_by_somebody_else_and_none_at_all(copy, keys):
    with pytest.raises(BundleError, match=r"is not signed: it has no manifest\.json\.sig"):
        open_bundle(copy, trusted_key=keys["ours"])
    sign(copy, keys)
    with pytest.raises(BundleError, match=r"by the key of .*other\.pem: bundle or key are others"):
        open_bundle(copy, trusted_key=keys["other"])
    (copy / SIGNATURE_NAME).unlink()
    (copy / SIGNATURE_NAME).mkdir()
    with pytest.raises(BundleError, match=r"manifest\.json\.sig cannot be read \("):
        open_bundle(copy, trusted_key=keys["ours"])


def test_keys_that_are_none(copy, keys, tmp_path):
    sign(copy, keys)
    (tmp_path / "text.pem").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    for path, sentence in (
            (keys["rsa"], "is of another kind than Ed25519"), (keys["private"], "is no public key in PEM"),
            (tmp_path / "text.pem", "is no public key in PEM"), (tmp_path / "none", "cannot be read"),
            (tmp_path, "cannot be read"), (Path("/dev/zero"), "cannot be read .it is no regular file")):
        with pytest.raises(RequestError, match=sentence):
            open_bundle(copy, trusted_key=path)


def test_without_the_library_a_sentence_says_what_to_install(copy):
    code = "from dmoe_export.cli import main; main(['inspect', sys.argv[1], '--trusted-key', 'key.pem'])"
    found = python_without(code, copy, blocked=("cryptography",))
    assert found.returncode == 3 and found.stderr == (
        f"dmoe-export: A trusted key needs cryptography; run: {pip_install('sign')}.\n")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the system has no openssl")
def test_the_commands_of_the_documentation(copy, tmp_path):
    """As docs/bundle.md has them, run in a shell."""
    pytest.importorskip("cryptography")
    page = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text(encoding="utf-8")
    commands = page.partition("\n## Seal\n")[2].partition("```sh\n")[2].partition("```")[0]
    lines = [line.partition(" #")[0] for line in commands.splitlines() if line.startswith("openssl")]
    assert len(lines) == 3
    shutil.copytree(copy, tmp_path / "BUNDLE")
    for line in lines:
        subprocess.run(line, shell=True, cwd=tmp_path, check=True, capture_output=True)
    open_bundle(tmp_path / "BUNDLE", trusted_key=tmp_path / "public.pem")
