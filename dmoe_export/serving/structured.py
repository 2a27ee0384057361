"""What an answer must match, as OpenAI's and vLLM's clients say it: our options `json_schema` and `regex`."""

from __future__ import annotations

from typing import Any

from ..grammar.schema.pieces import TooLarge, either, literal

# vLLM's: one field with parts, and its older names for the same.
_PARTS = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}
FIELDS = ("response_format", "structured_outputs", *_PARTS)
ANY_OBJECT = {"type": "object"}
_OWN = ("json_schema", "regex")


def with_structure(values: dict[str, Any]) -> dict[str, Any]:
    """A body in which `FIELDS` have become our options; raises ValueError for what they cannot mean."""
    kept = {name: value for name, value in values.items() if name not in FIELDS}
    said = [name for name in _OWN if kept.get(name) is not None]
    for name in FIELDS:
        value = values.get(name)
        options = {} if value is None else _options(name, value)
        if options and said:
            raise ValueError(f"{name} and {said[0]} both say what the answer matches; give one of them")
        said += [name] if options else []
        kept |= options
    return kept


def _options(name: str, value: Any) -> dict[str, Any]:
    if name == "response_format":
        return _response_format(value)
    if name in _PARTS:
        return _part(name, _PARTS[name], value)
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object with json, regex, choice or json_object")
    given = {part: one for part, one in value.items() if one is not None}
    if len(given) != 1:
        raise ValueError(f"{name} must have one of json, regex, choice and json_object")
    part, one = next(iter(given.items()))
    if part == "json_object" and one is True:
        return {"json_schema": ANY_OBJECT}
    return _part(f"{name}", part, one)


def _part(name: str, part: str, value: Any) -> dict[str, Any]:
    if part == "json":
        return {"json_schema": value}
    if part == "regex":
        return {"regex": value}
    if part != "choice":
        raise ValueError(f"{name} with {part[:50]} is not offered here; give json, regex, choice or json_object")
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise ValueError(f"{name} must have a list of texts to choose from, none of them empty")
    try:
        return {"regex": either([literal(one) for one in value]).text}
    except TooLarge:
        raise ValueError(f"{name} has too much text to choose from; give fewer or shorter ones") from None


def _response_format(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_schema":
        inside = value.get("json_schema")
        if not isinstance(inside, dict) or inside.get("schema") is None:
            raise ValueError("response_format of type json_schema must have json_schema with schema in it, such as "
                             '{"name": "answer", "schema": {"type": "object"}}')
        _only(value, ("type", "json_schema"))
        _only(inside, ("name", "description", "schema", "strict"))  # strict or not: the answer is valid
        return {"json_schema": inside["schema"]}
    if kind not in ("text", "json_object"):
        raise ValueError("response_format must be of type text, json_object or json_schema")
    _only(value, ("type",))
    return {"json_schema": ANY_OBJECT} if kind == "json_object" else {}


def _only(value: dict[str, Any], names: tuple[str, ...]) -> None:
    unknown = next((name for name in value if name not in names), None)
    if unknown is not None:
        raise ValueError(f"response_format has an unknown field {unknown[:50]}; leave it out")
