"""What an update costs: records of `patchssl bench step`, and the tables made of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from patchssl.eval.recordfile import files_below, read_record, write_record
from patchssl.eval.records import Amount, Word, safe_name
from patchssl.report.tables.render import write_frames
from patchssl.report.tables.scores import METHODS, NONE
from patchssl.runtime.errors import DataError

SCHEMA = 1
KIND, ENDING = "cost", ".cost.json"
ALL_TOKENS = ("pwself", "all tokens")
DINO = ("dino", "")
WAYS = [("pwself", "16 matches a pair"), ("pwself", "plain autograd"), ALL_TOKENS, DINO, ("ibot", "")]  # order of rows
NOT_RUN = "not run"
TITLE = "Cost of an update"
Count = Annotated[int, Field(ge=1)]
Time = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Step:
    """One way to make an update, and what it took."""

    method: Word  # pwself, dino, ibot
    way: str  # how the patch term is computed; empty: as always
    seconds: Annotated[list[Time], Field(min_length=1)]  # of each update after the first
    peak_mib: Time  # beyond what the libraries take
    floor_mib: Amount  # of it weights, gradients, optimizer and teacher

    @property
    def median(self) -> float:
        """Median seconds of an update."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class CostRecord:
    """The ways measured one after the other in one run, on one network; ValueError names a wrong field."""

    arch: Word
    num_prototypes: Count
    images: Count  # of an update
    views: Word
    device: Word  # the processor's or the accelerator's name
    threads: Count
    clock: Literal["processor", "wall"]  # processor seconds of the process, or by the clock
    memory: Literal["resident", "device"]  # growth of the resident memory, or torch's tensors on the device
    steps: Annotated[list[Step], Field(min_length=1)]
    versions: dict[str, str | None]

    def path(self, root: Path) -> Path:
        """Where the record lies below `root`: one file per network, batch and device."""
        name = safe_name(f"{self.arch}-{self.num_prototypes}-b{self.images}")
        return Path(root) / "cost" / f"{name}@{safe_name(f'{self.device}-{self.threads}')}{ENDING}"

    def write(self, root: Path) -> Path:
        """Save below `root`, replacing an earlier run of the same."""
        return write_record({"format": f"patchssl {KIND}", "schema": SCHEMA, **_PLAIN.dump_python(self)},
                            self.path(root))


_PLAIN = TypeAdapter(CostRecord)


class Setting(NamedTuple):
    """What numbers of one table have in common."""

    device: str
    threads: int
    images: int
    views: str
    clock: str
    memory: str
    torch: str

    @property
    def title(self) -> str:
        """Names the table."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.clock == "processor" else ""
        return f"{TITLE}: {self.images} image{'s' * (self.images > 1)} ({self.views}), {self.device}{threads}"

    @property
    def full_title(self) -> str:
        """Of tables that `title` does not tell apart."""
        threads = f", {self.threads} threads" if self.clock == "wall" else ""
        return f"{self.title}{threads}, torch {self.torch}, {self.clock} time, {self.memory} memory"


def read_costs(root: Path) -> tuple[list[CostRecord], list[str]]:
    """All cost records below `root`, in the order of their paths, and a sentence for every file skipped."""
    costs, problems = [], []
    for path in files_below(Path(root), ENDING):
        try:
            costs.append(read_record(path, _of_json, KIND, SCHEMA))
        except DataError as error:
            problems.append(str(error))
    return costs, problems


def cost_frames(costs: Iterable[CostRecord]) -> dict[str, pd.DataFrame]:
    """Title -> table, one per device, threads, batch and version of torch; without records one that says so."""
    groups: dict[Setting, list[CostRecord]] = {}
    for cost in sorted(costs, key=_order):
        groups.setdefault(_setting(cost), []).append(cost)
    titles = [setting.title for setting in groups]
    return {setting.title if titles.count(setting.title) == 1 else setting.full_title: _frame(setting, found)
            for setting, found in groups.items()} or {TITLE: _empty_frame()}


def cost_numbers(costs: Iterable[CostRecord]) -> pd.DataFrame:
    """One row per way: median, least and most milliseconds, MiB, and everything they depend on."""
    rows = [[step.method, step.way, cost.arch, cost.num_prototypes, *_setting(cost),
             *(round(1e3 * value, 4) for value in (step.median, min(step.seconds), max(step.seconds))),
             len(step.seconds), round(step.peak_mib, 4), round(step.floor_mib, 4)]
            for cost in sorted(costs, key=_order) for step in _steps(cost)]
    return pd.DataFrame(rows, columns=["method", "way", "arch", "num_prototypes", *Setting._fields, "ms", "ms_least",
                                       "ms_most", "n", "peak_mib", "floor_mib"], dtype=object)


def write_costs(costs: Sequence[CostRecord], out_dir: Path, stem: str = "cost") -> list[Path]:
    """Write STEM.md, STEM.csv and STEM.tex to `out_dir`."""
    return write_frames(cost_frames(costs), [cost_numbers(costs)], out_dir, stem)


def _of_json(**fields: Any) -> CostRecord:
    """A cost record from plain values."""
    if isinstance(steps := fields.get("steps"), list):
        fields["steps"] = [Step(**step) if isinstance(step, dict) else step for step in steps]
    return CostRecord(**fields)


def _frame(setting: Setting, costs: Sequence[CostRecord]) -> pd.DataFrame:
    body = [_row(cost, step) for cost in costs for step in _steps(cost)]
    frame = pd.DataFrame(body, columns=["Method", "Architecture", "Prototypes", "ms per update", "Peak, MiB",
                                        "of it weights and optimizer, MiB", "Time / all tokens", "Memory / all tokens",
                                        "Time / DINO", "Memory / DINO"], dtype=object)
    frame.attrs["notes"] = _notes(setting, [step for cost in costs for step in cost.steps])
    return frame


def _row(cost: CostRecord, step: Step) -> list[str]:
    label = METHODS.get(step.method, step.method) + (f", {step.way}" if step.way else "")
    low, high = (f"{1e3 * bound(step.seconds):,.0f}" for bound in (min, max))
    time = f"{1e3 * step.median:,.0f}" + (f" [{low}, {high}]" if len(step.seconds) > 1 else "")
    known = {(other.method, other.way): other for other in cost.steps}
    ratios = [f"{pick(step) / pick(peer):.2f}" if (peer := known.get(base)) else NOT_RUN
              for base in (ALL_TOKENS, DINO) for pick in (_seconds, _memory)]
    return [label, cost.arch, f"{cost.num_prototypes:,}", time, f"{step.peak_mib:,.0f}", f"{step.floor_mib:,.0f}",
            *ratios]


def _seconds(step: Step) -> float:
    return step.median


def _memory(step: Step) -> float:
    return step.peak_mib


def _notes(setting: Setting, steps: Sequence[Step]) -> list[str]:
    counts = sorted({len(step.seconds) for step in steps})
    updates = " or ".join(map(str, counts))
    clock = ("processor time of the process" if setting.clock == "processor" else "time by the clock")
    memory = ("growth of the resident memory" if setting.memory == "resident" else "torch's tensors on the device")
    return [f"ms: {clock}, color of the views included, their cutting and decoding not; median of {updates} "
            "updates after the first, [least, most] where there are several.",
            f"Peak: {memory}, weights, gradients, optimizer and teacher included. torch {setting.torch}.",
            "Ways of one architecture and number of prototypes were measured one after the other in one run, each in a "
            "process of its own, and are compared within that run only.",
            "All methods run in this engine with one recipe and head. All tokens: as the PW-Self authors' code does, "
            "every token of every view is projected and every match of their rule compared. Plain autograd: the "
            "matched tokens only, with whole matrices of logits. iBOT's masks are drawn, and its cost with them."]


def _empty_frame() -> pd.DataFrame:
    frame = pd.DataFrame([[METHODS[name], NONE, NONE, NOT_RUN, NOT_RUN] for name in ("pwself", "dino", "ibot")],
                         columns=["Method", "Architecture", "Prototypes", "ms per update", "Peak, MiB"], dtype=object)
    frame.attrs["notes"] = [f"{NOT_RUN}: there is no cost record among those read; make one with patchssl bench step "
                            "--results."]
    return frame


def _steps(cost: CostRecord) -> list[Step]:
    """The ways in the order of the tables, unknown ones last."""
    def place(step: Step) -> tuple[int, str, str]:
        key = (step.method, step.way)
        return (WAYS.index(key) if key in WAYS else len(WAYS), *key)

    return sorted(cost.steps, key=place)


def _setting(cost: CostRecord) -> Setting:
    return Setting(cost.device, cost.threads, cost.images, cost.views, cost.clock, cost.memory,
                   cost.versions.get("torch") or "not stated")


def _order(cost: CostRecord) -> tuple[Any, ...]:
    return (_setting(cost), cost.arch, cost.num_prototypes, [step.seconds for step in cost.steps])
