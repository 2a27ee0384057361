"""`dmoe-export check`: a bundle and its engines against the eager float32 reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MissingRequirementError
from ..runtime.choose import BACKENDS
from .options import VERIFY, seal_options
from .output import reader_may_leave
from .progress import step_bar

if TYPE_CHECKING:
    from ..check.result import IdentityCheck


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", metavar="CHECKPOINT",
              help="Folder or hub id of the checkpoint [the bundle's own weights: proves graph and backend alone].")
@click.option("--backend", "backends", type=click.Choice(BACKENDS), multiple=True,
              help="What to check; may be given more than once [onnxruntime, and auto's choice].")
@click.option("--layers", type=int, help="Check the first N layers only: little memory, nothing is decoded.")
@click.option("--cosine", type=float, help="Least cosine of a token [by precision: 0.999999 fp32, 0.999 fp16].")
@click.option("--recipe", metavar="NAME|FILE", help="Take the limits for layers alone from a recipe.")
@click.option("--atol", type=float, help="Most absolute difference of a logit [1e-3 fp32, else not asked].")
@click.option("--prompt", "prompts", multiple=True, help="Also feed and decode this text; may be given more than once.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of masks and random tokens.")
@click.option("--no-weights", is_flag=True, help="Do not compare the bundle's bytes with the checkpoint's.")
@VERIFY
@seal_options
@click.option("--report", type=click.Path(path_type=Path), help="Write a self-contained HTML file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def check(bundle: Path, report: Path | None, as_json: bool, no_weights: bool, **options: Any) -> None:
    """Compare BUNDLE with the eager float32 model; exit code 1 names the first bad layer.

    The result goes into the bundle's README.md, too, where it has one.
    """
    try:
        from ..check.card import record
        from ..check.run import check_bundle
        from ..check.table import show, show_identity
        if report:
            from ..check.report import write_report
    except ModuleNotFoundError as error:
        raise MissingRequirementError(
            f"Checking needs {error.name}; run: pip install 'dmoe-export[check]'.") from error

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
        click.echo(said, err=True)
    if not as_json:
        with reader_may_leave():
            if report:
                click.echo(f"Report: {report}")
            click.echo(f"{'PASSED' if result.passed else 'FAILED'}: {result.verdict}")
    if not result.passed:
        sys.exit(1)
