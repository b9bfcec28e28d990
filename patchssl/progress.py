"""How far a long pass is, told to whoever asked for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # how much is done, how much there is in all


def shifted(progress: Progress, before: int, total: int) -> Progress:
    """`progress` of one part as progress of the whole."""
    return lambda done, _: progress(before + done, total)
