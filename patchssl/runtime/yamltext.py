"""YAML and JSON as people write them: plain values, and no key twice in one table, of which the last would be taken.

A few lines of YAML can stand for gigabytes, each an alias of many of the line before: what a text stands for is
counted before it is built.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import yaml

from patchssl.runtime.errors import UsageError
from patchssl.runtime.text import cut

MOST_LETTERS = 2**18  # a recipe has a few thousand
MOST_DEPTH = 32  # tables and lists in one another
MOST_SHOWN = 380  # letters of a reason
_MOST_DIGITS = 100
_ALIASED = 8  # times the letters of a text that it may stand for
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_NOT_PLAIN = {f"{_TAG}timestamp": "a date", f"{_TAG}binary": "binary data", f"{_TAG}set": "a set",
              f"{_TAG}omap": "an ordered table", f"{_TAG}pairs": "a list of pairs"}


class _RefusedError(yaml.YAMLError):
    """What YAML allows and nothing here takes, such as a key that stands twice in one table."""


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
                raise _RefusedError(f"key '{cut(key, 100)}' stands twice, {lines}; keep one of them")
            first[key] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str, where: str) -> Any:
    """The values of YAML `text`; UsageError, which begins with `where`, for what is no YAML or no plain values, for a
    key given twice, and for text that stands for much more than it is long.

    >>> load_yaml("optim: {epochs: 5}", "recipe")
    {'optim': {'epochs': 5}}
    """
    where = cut(where, 200)
    try:
        if len(text) > MOST_LETTERS:
            raise _RefusedError(f"{len(text):,} letters are more than the {MOST_LETTERS:,} that are read")
        loader = _OnceLoader(text)
        if (node := loader.get_single_node()) is None:
            return None
        _stands_for(node, _ALIASED * len(text) + MOST_DEPTH, {}, 0)
        return loader.construct_document(node)
    except _RefusedError as error:
        raise UsageError(f"{where}: {error}") from None
    except RecursionError:
        raise UsageError(f"{where}: {_TOO_DEEP}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {cut(error, MOST_SHOWN)}") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # PyYAML's own converters
        raise UsageError(f"{where} is not YAML: a value does not fit its tag (!!...): {cut(error, 200)}") from None


_TOO_DEEP = f"tables and lists stand more than {MOST_DEPTH} deep in one another"


def _stands_for(node: yaml.Node, most: int, known: dict[yaml.Node, tuple[int, int]], depth: int) -> tuple[int, int]:
    """(letters, levels) of `node`, one for each value beside its text, aliases written out; _RefusedError for too many.

    `known` has the nodes that were counted; `depth` is how many this one is in.
    """
    if node in known:
        return known[node]
    if depth > MOST_DEPTH:  # or in itself
        raise _RefusedError(_TOO_DEEP)
    line = node.start_mark.line + 1
    if what := _NOT_PLAIN.get(node.tag):
        raise _RefusedError(f"line {line} has {what}, which no setting is; put quotes around it if it is text")
    if isinstance(node, yaml.ScalarNode):
        if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(node.value) > _MOST_DIGITS:
            raise _RefusedError(f"line {line} has a number of {len(node.value):,} digits")
        known[node] = 1 + len(node.value), 0
        return known[node]
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    found = [_stands_for(part, most, known, depth + 1) for part in inner]
    letters, levels = 1 + sum(count for count, _ in found), 1 + max((level for _, level in found), default=0)
    if letters > most:
        raise _RefusedError(f"line {line} stands for more than {most:,} letters, with its aliases (*) written out")
    if levels > MOST_DEPTH:
        raise _RefusedError(_TOO_DEEP)
    known[node] = letters, levels
    return known[node]


def load_json(text: str) -> Any:
    """The values of JSON `text`; ValueError for what is no JSON, and for a key that stands twice in one table.

    >>> load_json('{"a": {"b": 1}, "c": {"b": 2}}')
    {'a': {'b': 1}, 'c': {'b': 2}}
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("tables and lists are too deep in one another") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"the key '{cut(twice, 100)}' stands twice")
    return table
