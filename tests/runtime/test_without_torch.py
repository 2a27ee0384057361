"""The runtime imports and runs where torch and onnx do not exist."""

from __future__ import annotations

import json
import shutil

import pytest
from cpu_ops_helpers import built
from engine_helpers import plugin_library
from processes import python_without


def test_generate_without_torch(tiny_bundle):
    code = """
import json
from dmoe_export import Generator
result = Generator.open(sys.argv[1]).generate([[1, 2, 3], [4]], max_new_tokens=5, eos_id=-1)
assert not {"torch", "onnx"} & set(sys.modules)
print(json.dumps([r.token_ids for r in result]))
"""
    result = python_without(code, tiny_bundle.folder)
    assert result.returncode == 0, result.stderr
    assert [len(ids) for ids in json.loads(result.stdout)] == [5, 5]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("options", [{}, {"salient_threshold": 0.98}], ids=["plain", "salient"])
def test_no_graph_is_read_or_written_by_us(salient_llada, kernels, options):
    """ONNX Runtime opens the bundle's files itself, with our kernels and without: no Python sees an ONNX byte."""
    code = """
import json
from pathlib import Path
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from dmoe_export import Generator
from dmoe_export.runtime.cpu import library
library.INSTALLED = Path(sys.argv[2])
generator = Generator.open(sys.argv[1], backend="onnxruntime", verify="sizes")
(answer,) = generator.generate([[1, 2, 3]], max_new_tokens=16, eos_id=-1, steps=4, **json.loads(sys.argv[3]))
assert len(answer.token_ids) == 16 and any(path.endswith("manifest.json") for path in opened)
graphs = [path for path in opened if ".onnx" in Path(path).name]
assert not graphs, graphs
print(generator.backend_choice)
"""
    before = {file: file.stat().st_mtime_ns for file in salient_llada.folder.iterdir()}
    library = built() if kernels else salient_llada.folder / "none"
    result = python_without(code, salient_llada.folder, library, json.dumps(options))
    assert result.returncode == 0, result.stderr
    assert ("on our CPU kernels" in result.stdout) is kernels
    assert {file: file.stat().st_mtime_ns for file in salient_llada.folder.iterdir()} == before


def test_whole_command_line_imports_without_torch(tiny_bundle):
    result = python_without("from dmoe_export.cli import main\nmain(['inspect', sys.argv[1]])", tiny_bundle.folder)
    assert result.returncode == 0, result.stderr
    code = "from dmoe_export.cli import main\nmain(['export', '/nowhere', '--out', '/nowhere/else'])"
    result = python_without(code)
    assert result.returncode == 3
    assert "run: pip install 'torch>=" in result.stderr and "Traceback" not in result.stderr


def test_engines_are_built_without_torch(tiny_checkpoint, exported, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")
    plugin_library()
    folder = shutil.copytree(exported(tiny_checkpoint, precision="fp16", compute="fp16").folder, tmp_path / "b")
    code = "from dmoe_export.cli import main\nmain(['build', sys.argv[1], '--targets', 'sm89'])"
    result = python_without(code, folder, blocked=("torch", "onnx_ir", "onnxscript"))
    assert result.returncode == 0, result.stderr
    result = python_without(code, folder)  # onnx is blocked as well
    assert result.returncode == 3 and "Building engines needs onnx; install with" in result.stderr
