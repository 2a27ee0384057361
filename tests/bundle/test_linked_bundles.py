"""Bundles made of links: as a hub's cache lays them out, with a file on another disk, hard links, links to nowhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from cpu_ops_helpers import built
from device_helpers import decode, host_backend
from linked_layouts import ENGINE, hub
from ort_ops_helpers import CPU, library

from dmoe_export import Generator, export_checkpoint
from dmoe_export.bundle.engines import add_engine, copied_bundle, engine_file
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.check.instrument import open_layers
from dmoe_export.check.runners import session_in
from dmoe_export.errors import BundleError, MissingRequirementError
from dmoe_export.ops.schema import OPSET
from dmoe_export.runtime.cpu import library as cpu_ops
from dmoe_export.runtime.edited import EditedGraph
from dmoe_export.runtime.gpu.custom_ops import prepare_session
from dmoe_export.runtime.graph_errors import not_loaded
from dmoe_export.runtime.ort import ort

PROMPT = [5, 6, 7, 1, 9, 2, 4, 4, 3, 8]


def disk(source: Path, target: Path) -> Path:
    """Experts elsewhere, by an absolute link."""
    shutil.copytree(source, target / "b")
    (target / "big" / "disk").mkdir(parents=True)
    name = "experts.bin" if (source / "experts.bin").exists() else "denoiser.onnx.data"
    shutil.move(target / "b" / name, target / "big" / "disk" / "e.bin")
    (target / "b" / name).symlink_to(target / "big" / "disk" / "e.bin")
    return target / "b"


def folder(source: Path, target: Path) -> Path:
    """The folder itself is a link."""
    target.mkdir(exist_ok=True)
    (target / "link").symlink_to(source)
    return target / "link"


def hard(source: Path, target: Path) -> Path:
    """Of a copy: another link to a shared export's experts is a change of it, to a test that reads them meanwhile."""
    shutil.copytree(source, target / "own")
    return Path(shutil.copytree(target / "own", target / "b", copy_function=os.link))


def link_to_hub(source: Path, target: Path) -> Path:
    return folder(hub(source, target), target)


LAYOUTS = [hub, folder, hard, link_to_hub]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
ELSEWHERE = r"experts\.bin is a link to another folder than the graph's own; copy the bundle .*cp -rL"
follows = tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24)  # whatever links there are


def answer(path: Path, **options) -> list[int]:
    return Generator.open(path, backend="onnxruntime", threads=1, **options).generate(
        [PROMPT], max_new_tokens=40, eos_id=-1)[0].token_ids


@pytest.fixture(scope="module")
def expected(tiny_bundle):
    return answer(tiny_bundle.folder)


@every_layout
@pytest.mark.parametrize("kernels", [False, True])
def test_runs_on_the_cpu(tiny_bundle, tmp_path, monkeypatch, expected, layout, kernels):
    monkeypatch.setattr(cpu_ops, "INSTALLED", built() if kernels else tmp_path / "none.so")
    assert answer(layout(tiny_bundle.folder, tmp_path)) == expected


@pytest.mark.skipif(follows, reason="this ONNX Runtime follows every link")
def test_a_file_on_another_disk_is_refused(tiny_bundle, tmp_path):
    """By ONNX Runtime, and we say what helps; a graph that we edit is opened."""
    path = disk(tiny_bundle.folder, tmp_path)
    with pytest.raises(MissingRequirementError, match=ELSEWHERE):
        answer(path)
    with pytest.raises(MissingRequirementError, match=ELSEWHERE):
        host_backend(open_bundle(path))
    assert session_in(open_layers(open_bundle(path), 2).graph, open_bundle(path)).get_inputs()
    copy = Path(shutil.copytree(path, tmp_path / "copy"))  # follows links, as cp -rL
    assert answer(copy) == answer(tiny_bundle.folder)


@every_layout
def test_salient_graphs_run(salient_llada, tmp_path, layout):
    options = {"max_new_tokens": 16, "eos_id": -1, "steps": 4, "salient_threshold": 0.98}
    got, want = (Generator.open(path, backend="onnxruntime", threads=1).generate([PROMPT], **options)[0].token_ids
                 for path in (layout(salient_llada.folder, tmp_path), salient_llada.folder))
    assert got == want


@every_layout
def test_the_device_path_opens_it(tiny_bundle, tmp_path, expected, layout):
    """As the CUDA provider is opened, with the CPU provider in its place."""
    backend = host_backend(open_bundle(layout(tiny_bundle.folder, tmp_path)))
    assert decode(backend, [PROMPT], max_new_tokens=40, eos_id=-1)[0] == [expected]


@every_layout
def test_custom_ops_open_it(half_sample_bundle, tmp_path, layout):
    options = ort.SessionOptions()
    bundle = open_bundle(layout(half_sample_bundle.folder, tmp_path), "sizes")
    kernels = prepare_session(bundle, options, library())
    assert ort.InferenceSession(bundle.denoiser_path, options, providers=[CPU]) and kernels.kernels("DmoeMixture")


@every_layout
def test_the_check_opens_it(tiny_bundle, tmp_path, layout):
    bundle = open_bundle(layout(tiny_bundle.folder, tmp_path))
    assert session_in(open_layers(bundle, 2).graph, bundle).get_inputs()


def test_an_edited_graph_takes_the_manifest_s_files_only(tiny_bundle, tmp_path):
    """It names them by their real places, wherever links lead; what else a graph names stays unread."""
    bundle = open_bundle(hub(tiny_bundle.folder, tmp_path))
    graph = EditedGraph.of(onnx.load(bundle.denoiser_path, load_external_data=False), bundle)
    names = {entry.value for tensor in onnx.load_from_string(graph.model).graph.initializer
             for entry in tensor.external_data if entry.key == "location"}
    assert graph.folder.name == "blobs" and len(names) == 2 and all((graph.folder / name).is_file() for name in names)
    assert graph.ops == {op.name: op.count for op in bundle.manifest.denoiser.ops}
    for name in ("../../../secret", "/etc/passwd", "manifest.json"):
        model = onnx.load(bundle.denoiser_path, load_external_data=False)
        next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = name
        with pytest.raises(BundleError, match=r"takes weights from .*, which the manifest does not list"):
            EditedGraph.of(model, bundle)


@pytest.mark.parametrize(("name", "sentence"), [
    ("experts.bin", r"experts\.bin is a link to .*blobs/\w+, where no file is; fetch the bundle again, or copy"),
    ("manifest.json", r"is no bundle: it has a manifest\.json that is a link to .*, where no file is")])
def test_links_to_nowhere(tiny_bundle, tmp_path, name, sentence):
    path = hub(tiny_bundle.folder, tmp_path)
    (path / name).resolve().unlink()
    with pytest.raises(BundleError, match=sentence):
        open_bundle(path, "sizes")


def test_what_is_no_file(tiny_bundle, tmp_path):
    path = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "b"))
    (path / "experts.bin").unlink()
    (path / "experts.bin").symlink_to("experts.bin")
    with pytest.raises(BundleError, match="is a link to"):  # to itself
        open_bundle(path)
    (path / "experts.bin").unlink()
    os.mkfifo(path / "experts.bin")  # reading it would wait for ever
    with pytest.raises(BundleError, match="is no regular file"):
        open_bundle(path)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(BundleError, match=r"it is a link to .*gone, which does not exist"):
        open_bundle(tmp_path / "link")


def blobs(snapshot: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (snapshot.parents[1] / "blobs").iterdir()}


def test_an_engine_goes_into_the_folder_not_into_a_blob(tiny_bundle, tmp_path):
    """Also in place of one that is a link itself."""
    path = hub(tiny_bundle.folder, tmp_path)
    stranger = path.parents[1] / "blobs" / "engine"
    stranger.write_bytes(b"another bundle's")
    (path / ENGINE.file).symlink_to(stranger)
    (path / f".{ENGINE.file}.partial").symlink_to(stranger)
    before = blobs(path)
    with engine_file(path, ENGINE.file) as built_file:
        built_file.write_bytes(b"engine")
        add_engine(path, built_file, ENGINE)
    assert blobs(path) == before
    assert (path / ENGINE.file).read_bytes() == b"engine" and not (path / ENGINE.file).is_symlink()
    assert open_bundle(path).manifest.engines == [ENGINE]


def test_a_copy_of_links_is_no_copy_of_broken_links(tiny_bundle, tmp_path, expected):
    bundle = open_bundle(hub(tiny_bundle.folder, tmp_path / "hub"))
    before = blobs(bundle.folder)
    with copied_bundle(bundle, tmp_path / "deep" / "er" / "copy", overwrite=False):
        pass
    copy = open_bundle(tmp_path / "deep" / "er" / "copy")
    assert not any(file.is_symlink() for file in copy.folder.iterdir())
    assert answer(copy.folder) == expected and blobs(bundle.folder) == before


@pytest.mark.parametrize("layout", [hub, disk, link_to_hub], ids=lambda f: f.__name__)
def test_a_forced_export_leaves_what_links_point_to(tiny_bundle, tiny_checkpoint, tmp_path, layout):
    path = layout(tiny_bundle.folder, tmp_path)
    pointed = {link.resolve(): link.resolve().read_bytes() for link in path.iterdir()
               if link.is_symlink()}
    export_checkpoint(tiny_checkpoint, path, overwrite=True, block_length=16)
    assert pointed and all(file.read_bytes() == data for file, data in pointed.items())
    assert open_bundle(path).manifest.routing.block_length == 16
    assert not any(file.is_symlink() for file in path.iterdir())


@pytest.mark.parametrize(("words", "advice"), [
    ('External data path: "w.bin" escapes model directory: "/b"', "w.bin is a link to another folder than the graph's"),
    ("Load model failed: dmoe:X(-1) is not a registered function/op", "pip install -U onnxruntime"),
    ("Unsupported model IR version: 99, max supported IR version: 11", "pip install -U onnxruntime"),
    ("std::bad_alloc", "free memory"), ("", "copy or export the bundle again")])
def test_an_upgrade_is_advised_where_it_can_help(words, advice):
    newer = not_loaded(RuntimeError(words), "g.onnx", None, OPSET + 1)
    assert advice in str(newer) and isinstance(newer, MissingRequirementError) == bool(words)


@pytest.mark.parametrize(("version", "package", "words", "kind"), [
    ("1.23.0", "onnxruntime", "No Op registered for X", MissingRequirementError),
    ("1.31.1", "onnxruntime", "No Op registered for X", BundleError),
    ("1.31.1", "onnxruntime", "Could not find an implementation for X(23)", BundleError),
    ("1.31.1", "onnxruntime-gpu", "Could not find an implementation for X(23)", MissingRequirementError),
    ("1.31.1", "onnxruntime-gpu", "No Op registered for X", BundleError)])
def test_a_graph_that_this_version_knows_is_not_newer(monkeypatch, version, package, words, kind):
    """Whatever its bytes say: a damaged name of an op is unknown to every version."""
    monkeypatch.setattr("onnxruntime.__version__", version)
    error = not_loaded(RuntimeError(words), "g.onnx", None, OPSET, package)
    assert type(error) is kind and ("upgrade" in str(error)) == (kind is MissingRequirementError)


@pytest.mark.parametrize(("version", "advice"), [
    ("1.24.1", "upgrade with: pip install -U onnxruntime"), ("1.24.4", "cp -rL"), ("1.31.1", "cp -rL")])
def test_versions_that_follow_no_link(monkeypatch, version, advice):
    monkeypatch.setattr("onnxruntime.__version__", version)
    words = {"1.24.1": 'External data path: "experts.bin" escapes model directory: "/b"',
             "1.24.4": 'External data path: "experts.bin" (resolved path: "/e") escapes both model directory: "/b" and',
             "1.31.1": 'External data path escapes model directory. External data path: "experts.bin" resolved path'}
    why = str(not_loaded(RuntimeError(words[version]), "g.onnx", None, OPSET))
    assert "g.onnx: experts.bin is a link to another folder than the graph's own; " in why and advice in why


def test_a_graph_that_is_none_is_said_to_be_none(tiny_bundle, tmp_path):
    path = hard(tiny_bundle.folder, tmp_path)
    data = np.random.default_rng(0).bytes((path / "denoiser.onnx").stat().st_size)
    (path / "denoiser.onnx").unlink()
    (path / "denoiser.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"denoiser\.onnx is no ONNX model that fits its manifest \(.*; copy"):
        Generator.open(path, backend="onnxruntime", verify="sizes")
