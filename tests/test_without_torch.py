"""The runtime imports and runs where torch and onnx do not exist."""

from __future__ import annotations

import json
import subprocess
import sys

_BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnx_ir", "onnxscript", "huggingface_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def _python(code, *arguments):
    return subprocess.run([sys.executable, "-c", _BLOCKED + code, *map(str, arguments)], capture_output=True, text=True)


def test_generate_without_torch(tiny_bundle):
    code = """
import json
from dmoe_export import Generator
result = Generator.open(sys.argv[1]).generate([[1, 2, 3], [4]], max_new_tokens=5, eos_id=-1)
assert not {"torch", "onnx"} & set(sys.modules)
print(json.dumps([r.token_ids for r in result]))
"""
    result = _python(code, tiny_bundle.folder)
    assert result.returncode == 0, result.stderr
    assert [len(ids) for ids in json.loads(result.stdout)] == [5, 5]


def test_whole_command_line_imports_without_torch(tiny_bundle):
    result = _python("from dmoe_export.cli import main\nmain(['inspect', sys.argv[1]])", tiny_bundle.folder)
    assert result.returncode == 0, result.stderr
    code = "from dmoe_export.cli import main\nmain(['export', '/nowhere', '--out', '/nowhere/else'])"
    result = _python(code)
    assert result.returncode == 3
    assert "pip install 'dmoe-export[export]'" in result.stderr and "Traceback" not in result.stderr
