"""A program that answers with a bundle: what runs on a device. Needs dmoe-export with its extra `cpu`, no torch.

    python ask.py BUNDLE "what is 2 plus 3?"
"""

from __future__ import annotations

import sys

from dmoe_export import Generator
from dmoe_export.errors import DmoeError


def main() -> None:
    """Open the bundle, print the answer block by block, say on standard error what it took."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        generator = Generator.open(sys.argv[1])  # verifies every file; picks the best backend of this machine
        print(f"[{generator.backend.name}: {generator.backend_choice}]", file=sys.stderr)
        for block in generator.stream([sys.argv[2]], max_new_tokens=64):
            print(block.text, end="", flush=True)
        print()
        print(f"[{block.stats.forwards} forwards, {block.stats.unique_experts:.1f} experts per layer]", file=sys.stderr)
    except DmoeError as error:  # one sentence: what, its value, the fix
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
