"""`dmoe-export serve`: bundles behind OpenAI's HTTP interface."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ..errors import MissingRequirementError
from ..extras import pip_install
from ..serving.names import check_one_hash, names_of
from ..words import count
from .help import SETTINGS, Verb, option
from .opening import MEMORY, open_shown, opening_of, opening_options
from .output import say


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export serve sample.bundle --threads 2",
    "dmoe-export serve sample.bundle --port 8001 --max-batch 4 --max-new-tokens 256"))
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@option("--host", default="127.0.0.1", metavar="ADDRESS", group="network", help="Address to listen on")
@option("--port", type=click.IntRange(0, 65535), default=8000, group="network",
        help="Port to listen on; 0 takes any that is free")
@option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE", group="network", shown="no key is asked for",
        help="File with API keys, one per line")
@option("--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", group="network", shown="addresses, localhost",
        help="Name by which clients without a key may call the server; may be given again")
@option("--max-body", type=click.IntRange(1), default=2 << 20, group="network",
        help="Most bytes of a request's body")
@option("--name", "names", multiple=True, metavar="NAME", group="models", shown="its folder's name without .bundle",
        help="What clients call a bundle; may be given again, once per bundle in their order")
@option("--max-batch", type=click.IntRange(1, 1024), group="models", shown="the engine's, or 8",
        help="Most answers of a bundle that are decoded at once")
@option("--prefix-cache", metavar="SIZE", group="models", shown="none is kept",
        help="Memory of a bundle, such as 512M, for prompts that begin alike: their first blocks are computed once")
@option("--max-waiting", type=click.IntRange(0), default=64, group="requests",
        help="Most requests of a bundle beyond --max-batch; more are refused")
@option("--max-new-tokens", "most_new_tokens", type=click.IntRange(1), default=4096, group="requests",
        help="Most tokens that an answer may ask for")
@option("--timeout", type=click.FloatRange(0.1), default=600.0, group="requests",
        help="Most seconds of a request, waiting included")
@option("--drain-seconds", type=click.FloatRange(0), default=30.0, group="requests",
        help="Seconds that requests have to end after SIGTERM or ctrl-C")
@option("--log-prompts", is_flag=True, group="requests", help="Write prompts into the log, too")
@opening_options
@MEMORY
def serve(bundles: tuple[Path, ...], host: str, port: int, api_key_file: Path | None, allowed_hosts: tuple[str, ...],
          max_body: int, names: tuple[str, ...], max_batch: int | None, prefix_cache: str | None, max_waiting: int,
          most_new_tokens: int, timeout: float, drain_seconds: float, log_prompts: bool, memory: str | None,
          **options: Any) -> None:
    """Serve each BUNDLE, a folder or a hub id, to clients of OpenAI's interface.

    It begins with a line per bundle and one with its address on standard error; then a JSON line per request. SIGTERM
    and ctrl-C let requests end, then it exits with 0.
    """
    try:
        from ..serving import app, engine, gate, house, metrics, opening, process  # needs an extra
    except ModuleNotFoundError as error:
        raise MissingRequirementError(f"Serving needs {error.name}; run: {pip_install('serve')}.") from None
    opened = opening_of(options)
    called = names_of(bundles, names)
    check_one_hash(bundles, opened["expect_sha256"])
    keys = gate.read_keys(api_key_file)
    bound = process.listen(host, port)
    counted, engines = metrics.Metrics(), dict[str, engine.Engine]()
    try:
        for bundle, name in zip(bundles, called, strict=True):
            generator = open_shown(bundle, opened, memory=memory, max_batch=max_batch or 1, prefix_cache=prefix_cache)
            slots = max_batch or opening.slots_of(generator)
            engines[name] = engine.Engine(name, generator, slots, max_waiting, counted, prefix_cache)
            say(f"dmoe-export: {name}: {generator.bundle.folder} on {generator.backend.name} "
                f"({generator.backend_choice}), {count(slots, 'answer')} at once", err=True)
        rooms = house.House(engines, counted, most_new_tokens, timeout, log_prompts)
        outer = app.application(rooms, keys, max_body, allowed_hosts)
        process.run(outer, rooms, bound, drain_seconds, lambda: _say_where(process.address(bound), bool(keys)))
    finally:
        bound.close()
        for one in engines.values():
            one.close()


def _say_where(address: str, keys: bool) -> None:
    say(f"dmoe-export: serving on {address}", err=True)
    with suppress(ValueError):
        if not keys and not ipaddress.ip_address(address.split("//")[1].rpartition(":")[0].strip("[]")).is_loopback:
            say("dmoe-export: warning: other machines may reach it and no key is asked for (--api-key-file).", err=True)
