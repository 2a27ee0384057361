"""`dmoe-export completion`: the script that makes a shell complete verbs, options, choices and recipes."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .help import SETTINGS, Verb

INSTALL = {
    "bash": "dmoe-export completion bash > ~/.local/share/bash-completion/completions/dmoe-export",
    "zsh": "dmoe-export completion zsh > ~/.zfunc/_dmoe-export  (~/.zshrc: fpath+=~/.zfunc; autoload -Uz compinit; "
           "compinit)",
    "fish": "dmoe-export completion fish > ~/.config/fish/completions/dmoe-export.fish",
}


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export completion bash", "dmoe-export completion fish"))
@click.argument("shell", type=click.Choice(list(INSTALL)))
def completion(shell: str) -> None:
    """Print the script with which a shell completes this command's verbs, options, choices, files and recipes.

    Its first lines say where to put it.
    """
    kind = get_completion_class(shell)
    assert kind
    script = kind(click.Command(None), {}, "dmoe-export", "_DMOE_EXPORT_COMPLETE").source()
    first, line, rest = script.partition("\n")
    comment = f"# Once: {INSTALL[shell]}"
    # zsh reads #compdef in the first line only.
    click.echo(f"{first}{line}{comment}\n{rest}" if first.startswith("#") else f"{comment}\n{script}")
