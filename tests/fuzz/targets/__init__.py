"""What is fuzzed: the name of each target, and its share of the cases."""

from ..case import Make
from . import bundle, checkpoint, command_line, found, python_face, server, text

TARGETS: dict[str, tuple[Make, int]] = {
    "found": (found.again, 1),
    "config.json": (checkpoint.config, 8),
    "generation_config.json": (checkpoint.generation_config, 3),
    "safetensors header": (checkpoint.header, 6),
    "safetensors index": (checkpoint.index, 4),
    "manifest": (bundle.manifest, 6),
    "bundle, re-sealed": (bundle.sealed, 6),
    "bundle, not re-sealed": (bundle.damaged, 2),
    "graph, re-sealed": (bundle.graph, 6),
    "tokenizer": (text.tokenizer, 6),
    "chat template": (text.template, 6),
    "command line": (command_line.options, 10),
    "Python face": (python_face.calls, 4),
    "request to the server": (server.requests, 4),
}
