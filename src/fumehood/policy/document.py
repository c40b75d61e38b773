"""Text of a document -> (its data, the line of each key). TOML or YAML, both without their traps. Pure."""

# PyYAML ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import re
import tomllib
from collections.abc import Hashable
from typing import Any

import yaml

Lines = dict[tuple[str, ...], int]


def parse(text: str, *, is_toml: bool) -> tuple[dict[str, Any], Lines]:
    """Raises ValueError that names the line, for wrong syntax and for anything but a mapping with string keys."""
    try:
        data = tomllib.loads(text) if is_toml else yaml.load(text, _StrictLoader)
        lines = _toml_lines(text) if is_toml else _yaml_lines(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError("not a mapping with names as keys")
    return data, lines


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases (they grow exponentially when walked) and without doubled keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are refused", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} appears twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _toml_lines(text: str) -> Lines:
    """Key path -> line, for plain keys; tomllib keeps no positions. What it misses is reported without a line."""
    found: Lines = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line):
            table = tuple(header[1].split("."))
            found.setdefault(table, number)
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            found.setdefault((*table, *key[1].split(".")), number)
    return found


def _yaml_lines(text: str) -> Lines:
    found: Lines = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))

    walk(yaml.compose(text, _StrictLoader), ())
    return found
