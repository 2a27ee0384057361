"""How help looks, the same for every verb: options under headings, each with its values and its default in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class GroupedOption(click.Option):
    """An option that knows the heading it stands under, and a word that is a value besides those of its type."""

    def __init__(self, *args: Any, group: str = "other options", word: str | None = None, **more: Any) -> None:
        self.group, self.word = group, word
        super().__init__(*args, **more)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Its value; a number takes ASCII alone, where Python's own reading takes digits of every script."""
        if value is not None and value == self.word:
            return value
        for text in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(self.type, (click.types.IntParamType, click.types.FloatParamType)) and (
                    isinstance(text, str) and not (text.isascii() and "_" not in text)):
                raise click.BadParameter(f"{text[:100]!r} is no number in digits 0 to 9.", ctx, self)
        cast = super().type_cast_value(ctx, value)
        if isinstance(self.type, click.FloatRange) and cast is not None and not math.isfinite(cast):
            raise click.BadParameter(f"{cast} is no finite number.", ctx, self)  # nan is in every range
        return cast

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Its help as it is: click would add a range and a default in its own way."""
        record = super().get_help_record(ctx)
        return record and (record[0], self.help or "")


def option(*names: str, group: str, help: str, shown: str | None = None, values: str | None = None,
           **more: Any) -> Callable[[F], F]:
    """`click.option` under the heading `group`; its help is `help [values; default: shown].`

    `help` is a sentence without a full stop. `values` and `shown` come from the option's type and default where these
    say it.
    """
    kind, default = more.get("type", type(more.get("default"))), more.get("default")
    if more.get("is_flag"):
        return click.option(*names, cls=GroupedOption, group=group, help=f"{help}.", **more)
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        values = values or _range(kind.min, kind.max)
    if isinstance(default, bool):
        shown = shown or ("on" if default else "off")
    elif default is not None and not more.get("multiple"):
        shown = shown or str(default)
    facts = [*([values] if values else []), *([f"default: {shown}"] if shown else [])]
    more.setdefault("metavar", metavar(kind))
    words = f"{help} [{'; '.join(facts)}]." if facts else f"{help}."
    return click.option(*names, cls=GroupedOption, group=group, help=words, **more)


def _range(least: float | None, most: float | None) -> str | None:
    if least is not None and most is not None:
        return f"between {least} and {most}"
    if least is not None:
        return "0 or more" if least == 0 else f"at least {least}"
    return None if most is None else f"at most {most}"


def metavar(kind: Any) -> str | None:
    """N for integers, X for other numbers, click's own word for the rest."""
    if kind is int or isinstance(kind, click.IntRange):
        return "N"
    return "X" if kind is float or isinstance(kind, click.FloatRange) else None


def folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completion of an argument that may be a hub id, too."""
    return [CompletionItem(incomplete, type="dir")]


class _Headings(click.Command):
    """Options in the order of their headings, examples at the end; errors of usage are told by `Verbs`."""

    examples: tuple[str, ...] = ()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Every group under its own heading, in the order in which the groups first appear; the rest last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx) if isinstance(param, click.Option) else None:
                groups.setdefault(getattr(param, "group", "other options"), []).append(record)
        for group in sorted(groups, key="other options".__eq__):
            with formatter.section(f"{group[0].upper()}{group[1:]}"):
                formatter.write_dl(groups[group], col_max=26)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, unwrapped, so that they can be copied."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Verb(_Headings):
    """A command with examples, each a line that runs where `sample.bundle` and `samples/tiny-dmoe` lie."""

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **more: Any) -> None:
        self.examples = examples
        super().__init__(*args, **more)


class Verbs(_Headings, click.Group):
    """A group whose verbs are imported when they are used: `members` is name → (module:attribute, short help)."""

    def __init__(self, *args: Any, members: dict[str, tuple[str, str]], **more: Any) -> None:
        super().__init__(*args, **more)
        self.members = members
        self.commands = dict.fromkeys(members)  # type: ignore[assignment]  # names, to suggest

    def list_commands(self, ctx: click.Context | None) -> list[str]:
        """In the order in which they are used."""
        return list(self.members)

    def get_command(self, ctx: click.Context | None, cmd_name: str) -> click.Command | None:
        """Import it."""
        if cmd_name not in self.members:
            return None
        module, _, attribute = self.members[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f".{module}", __package__), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Whole sentences, without importing the verbs."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in self.members.items()])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Verbs first: they are what a reader is after."""
        self.format_commands(ctx, formatter)
        super().format_options(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of verbs, without importing them, and options."""
        return [*(CompletionItem(name, help=short) for name, (_, short) in self.members.items()
                  if name.startswith(incomplete)), *click.Command.shell_complete(self, ctx, incomplete)]
