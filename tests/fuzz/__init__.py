"""A fuzzer of the whole program: hostile files, command lines and calls, each in a process of its own.

make fuzz                                      5 500 cases, the table of their outcomes
PYTHONPATH=tests python -m fuzz --help         fewer of them, other seeds, one target
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
