"""The seeds that every generator takes: NumPy any from 0 on, torch those of 64 bits."""

from __future__ import annotations

import operator

from patchssl.runtime.errors import UsageError

MOST_SEED = 2**64 - 2  # a head is drawn by the seed after its backbone's


def require_seed(seed: object) -> int:
    """`seed` as an int; UsageError for one that is no whole number from 0 to MOST_SEED."""
    try:
        number = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"seed = {seed!r} is no whole number; choose one from 0 on") from None
    if not 0 <= number <= MOST_SEED:
        raise UsageError(f"seed = {number} is {'negative' if number < 0 else 'beyond 64 bits'}; choose a whole number "
                         f"from 0 to {MOST_SEED}")
    return number
