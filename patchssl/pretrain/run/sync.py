"""Where the processes of a run agree: when to log, to save, to stop, and which images could not be read.

Each has its own clock and its own signals, and all have to do the same: at a meeting everybody says what happened to
it, and what rank 0 says of the time counts. Between meetings nobody waits for anybody but for gradients. A process that
is alone meets nobody, after every update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from patchssl.runtime.distributed import all_gather_objects, world_size

MOST_SECONDS = 5.0  # until a signal is noticed: torchrun kills after 30


class LocalStatus(NamedTuple):
    """What one process tells the others."""

    signal: int | None
    unreadable: Mapping[str, str]
    log_due: bool
    save_due: bool
    seconds_per_step: float


class Decision(NamedTuple):
    """What all of them go by."""

    signal: int | None  # the first rank's that got one
    unreadable: Mapping[str, str]
    log_due: bool
    save_due: bool


@dataclass
class RankSync:
    """When the next meeting is: the same update in every process."""

    log_seconds: float
    next_step: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)  # since the last meeting: name -> reason

    def due(self, step: int) -> bool:
        """Is there one after update `step`?"""
        return step >= self.next_step

    def hold(self, step: int, said: LocalStatus) -> Decision:
        """Hear what every process says after update `step`, and set the next meeting; all call this together."""
        everybody = all_gather_objects(said)
        first = everybody[0]
        if world_size() > 1:
            pace = min(self.log_seconds, MOST_SECONDS) / max(1e-6, first.seconds_per_step)
            self.next_step = step + max(1, round(pace))
        self.unreadable = {}
        return Decision(next((one.signal for one in everybody if one.signal is not None), None),
                        {name: why for one in everybody for name, why in one.unreadable.items()},
                        first.log_due, first.save_due)
