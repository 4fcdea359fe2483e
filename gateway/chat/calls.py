"""Calls of tools as models write them, one function for each way to write: None where it cannot be read. Pure."""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from .events import Call

Schemas: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's arguments, by the tool's name."""
ReadCalls: TypeAlias = Callable[[str, Schemas], list[Call] | None]

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>\s*", re.DOTALL)
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_NUMBERED = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?")


def object_call(text: str, schemas: Schemas) -> list[Call] | None:
    """`{"name": …, "arguments": {…}}`, as Hermes and Qwen write it."""
    return _one(_call_of(_json(text)))


def objects_call(text: str, schemas: Schemas) -> list[Call] | None:
    """`{"name": …, "parameters": {…}}`, as Llama writes it, one or several with semicolons or space in between."""
    at, found = 0, list[Call]()
    text = text.strip()
    while at < len(text):
        start = at
        try:
            _, at = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            return None
        if (call := _call_of(_json(text[start:at]))) is None:
            return None
        found.append(call)
        while at < len(text) and text[at] in "; \t\r\n":
            at += 1
    return found or None


def tagged_call(text: str, schemas: Schemas) -> list[Call] | None:
    """`<function=NAME><parameter=KEY>VALUE</parameter></function>`, as Qwen3-Coder writes it: a value is what its
    parameter's schema says that it is."""
    if (function := _FUNCTION.fullmatch(text)) is None:
        return None
    name, inner = function[1].strip(), function[2]
    arguments: dict[str, Any] = {}
    at = 0
    while at < len(inner.rstrip()):
        if (parameter := _PARAMETER.match(inner, at)) is None:
            return None
        key = parameter[1].strip()
        arguments[key] = _value(parameter[2].removeprefix("\n").removesuffix("\n"), schemas.get(name, {}), key)
        at = parameter.end()
    return [Call(name, _dumped(arguments))]


def separated_call(separator: str) -> ReadCalls:
    """A name, a separator and a JSON object, as DeepSeek and Kimi write it; the older of DeepSeek's with the kind of
    the call before the name, and a fence around the object."""

    def read(text: str, schemas: Schemas) -> list[Call] | None:
        before, found, after = text.partition(separator)
        name = before.strip()
        if not found:
            return None
        if name == "function" and "\n" in after:
            name, _, after = after.partition("\n")
        if fence := _FENCE.fullmatch(after):
            after = fence[1]
        if (plain := _NUMBERED.fullmatch(name.strip())) is None:
            return None
        return _one(named_call(plain[1], after))

    return read


def named_call(name: str, arguments: str) -> Call | None:
    """Of a tool whose name is known already."""
    value = _json(arguments.strip() or "{}")
    return Call(name, _dumped(value)) if isinstance(value, dict) and name else None


def _one(call: Call | None) -> list[Call] | None:
    return None if call is None else [call]


def _call_of(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    return Call(value["name"], _dumped(arguments)) if isinstance(arguments, dict) else None


def _value(text: str, schema: Mapping[str, Any], key: str) -> Any:
    properties = schema.get("properties")
    said = properties.get(key) if isinstance(properties, dict) else None
    if isinstance(said, dict) and said.get("type") == "string":
        return text
    value = _json(text)
    return text if value is _NONE else value


_NONE = object()


def _json(text: str) -> Any:
    """`_NONE` where it is none, or has what others cannot read: NaN, infinities, halves of characters."""
    try:
        text.encode()
        value = _DECODER.decode(text)
        _dumped(value).encode()
    except (ValueError, RecursionError):
        return _NONE
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(digits)
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
