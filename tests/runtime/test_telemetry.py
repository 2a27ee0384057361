"""ONNX Runtime sends nothing to its maker, and keeps nothing for that, unless a user wants it to."""

from __future__ import annotations

import os
import subprocess
import sys

# Where these are set, ONNX Runtime is silent by itself, and so would be this test.
ITS_OWN = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "ORT_RUNNING_UNIT_TESTS", "ORT_DISABLE_TELEMETRY")


def test_generating_leaves_nothing_in_the_home_folder(sample_bundle, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ITS_OWN}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "dmoe_export", "generate", sample_bundle.folder, "--prompt",
                           "what is 2 plus 3?"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "2 + 3 = 5" in done.stdout, done.stderr
    assert not list(tmp_path.rglob("*"))
