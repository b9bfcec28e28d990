"""Sentences about many things: counts, lists cut short, commands to go on with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl

from patchssl.runtime.errors import UsageError


def command(*words: object) -> str:
    """A command of this package as a shell takes it, whatever a path in it holds; all of it can be printed.

    >>> command("pretrain", "--resume", "my runs/first")
    "patchssl pretrain --resume 'my runs/first'"
    """
    return " ".join(["patchssl", *(_quoted(str(word)) for word in words)])


def _quoted(word: str) -> str:
    r"""A word of a command; what cannot be printed is written as bash and zsh take it, $'caf\351'."""
    if word.isprintable():
        return shlex.quote(word)
    safe = set(range(32, 127)) - set(b"\\'")
    return "$'" + "".join(chr(byte) if byte in safe else f"\\{byte:03o}"
                          for byte in word.encode("utf-8", "surrogateescape")) + "'"


def resume_command(folder: object) -> str:
    """What goes on with the run in `folder`."""
    return command("pretrain", "--resume", folder)


def query_options(query: str, where: str, *, escaped: bool = True) -> dict[str, str]:
    """What stands behind a "?", as in a=1&b=2; UsageError for what is no such list, and for a name given twice.

    Not `escaped`: + and % mean themselves, as in a path.

    >>> query_options("image=left&label=", "x"), query_options("root=a+b", "x", escaped=False)
    ({'image': 'left', 'label': ''}, {'root': 'a+b'})
    """
    pairs = (parse_qsl(query, keep_blank_values=True) if escaped else
             [part.partition("=")[::2] for part in query.split("&") if part])
    options = dict(pairs)
    if query and not pairs:
        raise UsageError(f"'?{query}' in {where} is not understood; write ?name=value&name=value")
    if len(options) < len(pairs):
        names = [name for name, _ in pairs]
        raise UsageError(f"{where}: {next(name for name in names if names.count(name) > 1)}= stands twice; keep one")
    return options


def counted(others: Mapping[str, int]) -> str:
    """
    >>> counted({".heic": 12, ".txt": 1})
    '13 files with other extensions (.heic 12, .txt 1)'
    """
    common = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    listed = shortened([f"{extension} {count:,}" for extension, count in common], 5)
    total = sum(others.values())
    return f"{total:,} file{'s' * (total != 1)} with other extensions ({listed})"


def shortened(items: Sequence[str], most: int) -> str:
    """
    >>> shortened(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def cut(text: object, most: int) -> str:
    """
    >>> cut("abcdef", 4), cut(12, 4)
    ('abcd...', '12')
    """
    shown = str(text)
    return shown if len(shown) <= most else f"{shown[:most]}..."
