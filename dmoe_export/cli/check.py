"""`dmoe-export check`: a bundle and its engines against the eager float32 reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MissingRequirementError
from ..extras import pip_install
from ..runtime.choose import BACKENDS
from .help import SETTINGS, Verb, folders, option
from .options import CPU_PRODUCTS, VERIFY, seal_options
from .output import reader_may_leave, say
from .progress import step_bar
from .recipes import complete_recipe

if TYPE_CHECKING:
    from ..check.result import IdentityCheck


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export check sample.bundle --reference samples/tiny-dmoe",
    "dmoe-export check sample.bundle --layers 2 --no-weights --report check.html"))
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--reference", metavar="CHECKPOINT", group="what is compared", shell_complete=folders,
        shown="the bundle's own weights: proves graph and backend alone",
        help="Folder or hub id of the checkpoint")
@option("--backend", "backends", type=click.Choice(BACKENDS), multiple=True, group="what is compared",
        shown="onnxruntime, and auto's choice", help="What to check; may be given again")
@CPU_PRODUCTS
@option("--layers", type=int, group="what is compared", values="at least 1", shown="all",
        help="Check the first so many layers only: little memory, nothing is decoded")
@option("--prompt", "prompts", multiple=True, metavar="TEXT", group="what is compared",
        help="Also feed and decode this text; may be given again")
@option("--seed", type=click.IntRange(0), default=0, group="what is compared", help="Of masks and random tokens")
@option("--no-weights", is_flag=True, group="what is compared",
        help="Do not compare the bundle's bytes with the checkpoint's")
@option("--cosine", type=float, group="limits", values="between -1 and 1",
        shown="by precision: 0.999999 fp32, 0.999 fp16",
        help="Least cosine between a token's vectors and the reference's; higher is stricter")
@option("--atol", type=float, group="limits", values="0 or more", shown="1e-3 fp32, else not asked",
        help="Most absolute difference of a logit; lower is stricter")
@option("--recipe", metavar="NAME|FILE", group="limits", shell_complete=complete_recipe,
        help="Take the limits, and nothing else, from a recipe")
@VERIFY
@seal_options
@option("--report", type=click.Path(path_type=Path), metavar="FILE", group="output",
        help="Write a self-contained HTML file")
@option("--json", "as_json", is_flag=True, group="output", help="Print the report as one JSON object")
def check(bundle: Path, report: Path | None, as_json: bool, no_weights: bool, **options: Any) -> None:
    """Compare BUNDLE with the eager float32 model, layer by layer.

    A bundle that fails ends with exit code 1 and the name of the first bad layer. The result goes into the bundle's
    README.md, too, where it has one.
    """
    try:
        from ..check.card import record
        from ..check.run import check_bundle
        from ..check.table import show, show_identity
        if report:
            from ..check.report import write_report
    except ModuleNotFoundError as error:
        raise MissingRequirementError(
            f"Checking needs {error.name}; run: {pip_install('check')}.") from error

    def announce(identity: IdentityCheck) -> None:
        with reader_may_leave():
            show_identity(identity, stderr=as_json)

    with step_bar("check", shown=not as_json) as tell:
        result = check_bundle(bundle, weights=not no_weights, announce=announce, tell=tell, **options)
    with reader_may_leave():  # and the exit code still tells what was found
        if as_json:
            click.echo(result.model_dump_json())
        else:
            show(result)
    if report:
        write_report(result, report)
    if said := record(result, bundle):
        say(said, err=True)
    if not as_json:
        with reader_may_leave():
            if report:
                say(f"Report: {report}")
            say(f"{'PASSED' if result.passed else 'FAILED'}: {result.verdict}")
    if not result.passed:
        sys.exit(1)
