"""YAML and JSON as people write them: plain values, and no key twice in one table, of which the last would be taken."""

from __future__ import annotations

import json
from typing import Any

import yaml

from patchssl.runtime.errors import UsageError

_MERGE = "tag:yaml.org,2002:merge"


class _TwiceError(yaml.YAMLError):
    """A key that stands twice in one table."""


class _OnceLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key that stands twice; one that a merge (<<) brings in may be overridden."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
                continue
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in first:
                lines = f"in line {line}" if line == first[key] else f"in lines {first[key]} and {line}"
                raise _TwiceError(f"key '{key}' stands twice, {lines}; keep one of them")
            first[key] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str, where: str) -> Any:
    """The values of YAML `text`; UsageError, which begins with `where`, for what is no YAML and for a key given twice.

    >>> load_yaml("optim: {epochs: 5}", "recipe")
    {'optim': {'epochs': 5}}
    """
    try:
        return yaml.load(text, _OnceLoader)
    except _TwiceError as error:
        raise UsageError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {error}") from None


def load_json(text: str) -> Any:
    """The values of JSON `text`; ValueError for what is no JSON, and for a key that stands twice in one table.

    >>> load_json('{"a": {"b": 1}, "c": {"b": 2}}')
    {'a': {'b': 1}, 'c': {'b': 2}}
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' stands twice")
    return table
