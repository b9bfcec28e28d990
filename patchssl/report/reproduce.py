"""How to meet every published number that our protocols cover: the command, what it should print, how near is near.

Made from `models.csv` and `tables/published.csv`, so that it cannot say anything else than they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from patchssl.report.catalog import KnownModel, known_models, published_scores
from patchssl.report.tables.published import Published, read_published

METHODS = ("dino", "ibot")
ROOT = "sets"  # the folder of all sets


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One benchmark as `published.csv` names it, and how it is run here."""

    command: str  # with {model}, {name} and {protocol}
    metric: str  # of the record
    tolerance: float  # points
    reason: str


_KNN = Bench(command="eval knn {model} --data {root}/imagenet1k --protocol dino", metric="top1@20", tolerance=0.2,
             reason="nothing is drawn, what is left is rounding (0.05), half precision and another JPEG decoder or "
                    "resizing: 0.2 are 100 of 50,000 images")
_LINEAR = Bench(command="eval linear {model} --data {root}/imagenet1k --protocol dino", metric="top1", tolerance=0.5,
                reason="the probe is trained, and was printed as the best of a sweep over learning rates that are not "
                       "all named; the protocol has one, so expect it to end at or below the number")
_COPIES = Bench(command="eval copydays {model} --data {root}/copydays --protocol dino", metric="strong/map",
                tolerance=1.0, reason="which 10,000 and 20,000 photographs of YFCC100M were taken is not published; "
                                      "DINO's paper and README print 85.5 and 85.8 for one network")
_RETRIEVAL = "eval revisited {model} --data {root} --set {name} --protocol {protocol}"
_PLACES = {f"{name}-{letter}": Bench(
    command=_RETRIEVAL.replace("{name}", name), metric=f"{level}/map", tolerance=0.5,
    reason="of 70 queries one whose AP moves by 0.35 moves the mean by 0.5; the photographs that are offered today "
           "have blurred faces, those of the papers had not (`data get --from` takes the first release)")
    for name in ("roxford5k", "rparis6k") for letter, level in (("M", "medium"), ("H", "hard"))}
BENCHES = {"imagenet1k-knn": _KNN, "imagenet1k-linear": _LINEAR, "copydays-strong": _COPIES, **_PLACES}


class Target(NamedTuple):
    """A command, and the printed numbers that its record should meet."""

    model: KnownModel
    command: str
    expected: tuple[tuple[str, tuple[Published, ...], float], ...]  # metric, printed numbers, tolerance in points


def targets() -> list[Target]:
    """Every command for DINO's and iBOT's public Vision Transformers with a printed number, in the catalog's order.

    Training checkpoints that hold the same weights again are skipped.
    """
    found = []
    for model in known_models():
        if model.method in METHODS and model.patch_size and not model.network:
            commands: dict[str, list[tuple[str, tuple[Published, ...], float]]] = {}
            for benchmark, numbers in published_scores(model).items():
                for protocol in sorted({name for number in numbers if (name := number.protocol_name)}):
                    bench = BENCHES[benchmark]
                    line = "patchssl " + bench.command.format(model=_model(model), root=ROOT, protocol=protocol)
                    same = tuple(number for number in numbers if number.protocol_name == protocol)
                    commands.setdefault(line, []).append((bench.metric, same, bench.tolerance))
            found += [Target(model, line, tuple(expected)) for line, expected in commands.items()]
    return found


def as_markdown() -> str:
    """The page results/REPRODUCE.md."""
    parts = [_HEAD, *(_section(model, [t for t in targets() if t.model == model])
                      for model in dict.fromkeys(target.model for target in targets())), _tolerances(), _not_covered()]
    return "\n".join(parts)


def _section(model: KnownModel, found: Sequence[Target]) -> str:
    where = [f"`{model.uri}` comes through the hub; {model.url} has the same weights.", ""] if model.uri else []
    lines = [f"### {model.name}", "", *where, "```sh"]
    if not model.uri:
        lines.append(f"curl --create-dirs -o {_model(model)} {model.url}")
    for target in found:
        lines += [target.command, *(f"#   {metric} {_numbers(numbers)} ± {tolerance}"
                                    for metric, numbers, tolerance in target.expected)]
    printed = [number for target in found for _, numbers, _ in target.expected for number in numbers]
    sources = dict.fromkeys(number.source for number in printed)
    return "\n".join([*lines, "```", "", "Printed in: " + "; ".join(sources) + ".", ""])


def _model(model: KnownModel) -> str:
    """What to write for MODEL; a downloaded file in the folder its address has, as many are called alike."""
    return model.uri or "/".join(str(model.url).split("/")[-2:])


def _numbers(numbers: Iterable[Published]) -> str:
    return " or ".join(f"{value:.1f}" for value in dict.fromkeys(100 * number.value for number in numbers))


def _tolerances() -> str:
    reasons = {"k-NN": _KNN, "Linear probe": _LINEAR, "Copydays": _COPIES, "Oxford and Paris": _PLACES["roxford5k-M"]}
    return "\n".join(["## Why so near and no nearer", "",
                      *(f"- {name}, ± {bench.tolerance} points: {bench.reason}." for name, bench in reasons.items()),
                      "- The code adds nothing to that: on the same images and weights it gives the official scripts' "
                      "numbers ([PARITY.md](PARITY.md)).", ""])


def _not_covered() -> str:
    """Printed numbers of the same networks that no command above is for, counted by the reason."""
    covered = {number for target in targets() for _, numbers, _ in target.expected for number in numbers}
    ours = [row for row in read_published() if row.method.split(" (")[0] in ("DINO", "iBOT")
            and row.arch.startswith("ViT") and row not in covered]
    groups: dict[str, int] = {}
    for row in ours:
        groups[_why(row)] = groups.get(_why(row), 0) + 1
    return "\n".join(["## Printed, and not to be met here", "",
                      *(f"- {count}: {why}." for why, count in sorted(groups.items())),
                      "- PW-Self: its authors' numbers and weights are not available to us.", ""])


def _why(row: Published) -> str:
    if row.benchmark not in BENCHES:
        return "other benchmarks (video segmentation, fine-tuning, transfer)"
    if row.protocol_name is None:
        return "other protocols (another evaluation code, ablations of the probe)"
    return "networks whose weights are not public, or ablations under the name of a method's variant"


_MILLION = "\n".join("patchssl " + _RETRIEVAL.format(model="timm:vit_small_patch16_224.dino", root=ROOT, name=name,
                                                      protocol=f"revisitop --distractors {ROOT}/revisitop1m")
                     for name in ("roxford5k", "rparis6k"))
_HEAD = f"""# Meeting the published numbers

Every number of DINO and iBOT on a Vision Transformer that a protocol of ours covers: what to run, what the record
should say (percent), how near. None of it has been run where this was written: neither the weights nor these sets could
be had there. `patchssl tables --reproduce` prints this page from the catalog and the table of published numbers.

## The sets

```sh
patchssl data check {ROOT}/imagenet1k                 # yours: train/ and val/ with 1,000 class folders each
patchssl data get copydays {ROOT}
patchssl data check {ROOT}/copydays                   # 157 originals, 229 strong copies
patchssl data get roxford5k {ROOT}
patchssl data get rparis6k {ROOT}
patchssl data check {ROOT}/roxford5k
patchssl data check {ROOT}/rparis6k
patchssl data get revisitop1m {ROOT}                  # a million distractors, some hundred GB
```

Copydays' published numbers have 10,000 distractors and 20,000 whitening images of YFCC100M: lay yours into
{ROOT}/copydays/distractors and {ROOT}/copydays/whitening, or name them by `--distractors` and `--whitening`. Official
files are downloaded by hand; `patchssl inspect FILE` says whether one is whole.

With the million distractors (no such number is printed for these networks; any model serves):

```sh
{_MILLION}
```

`patchssl tables` then sets what was measured beside what is printed, with intervals.

## The networks
"""
