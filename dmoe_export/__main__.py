"""`python -m dmoe_export`."""

from .cli import main

main(prog_name="dmoe-export")
