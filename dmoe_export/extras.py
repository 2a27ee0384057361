"""What to install for a part of the package that needs more than the rest."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def pip_install(extra: str) -> str:
    """The command that installs an extra of this package, by its requirements.

    This package is on no package index, so its own name is no advice.
    """
    try:
        wanted = _requirements(extra)
    except PackageNotFoundError:  # run from a checkout that nobody installed
        return f"pip install '.[{extra}]' in a checkout of dmoe-export"
    return "pip install " + " ".join(f"'{one}'" for one in dict.fromkeys(wanted))


def _requirements(extra: str) -> list[str]:
    found = []
    for line in requires("dmoe-export") or []:
        requirement, _, marker = line.partition(";")
        if not re.search(rf"extra == ['\"]{extra}['\"]", marker):
            continue
        own = re.fullmatch(r"dmoe[-_]export\[(\w+)\]", requirement.strip())
        found += _requirements(own[1]) if own else [requirement.strip()]
    return found
