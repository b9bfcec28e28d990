"""Sentences about many things: counts, lists cut short, commands to go on with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence


def command(*words: object) -> str:
    """A command of this package as a shell takes it, whatever a path in it holds.

    >>> command("pretrain", "--resume", "my runs/first")
    "patchssl pretrain --resume 'my runs/first'"
    """
    return shlex.join(["patchssl", *map(str, words)])


def resume_command(folder: object) -> str:
    """What goes on with the run in `folder`."""
    return command("pretrain", "--resume", folder)


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
