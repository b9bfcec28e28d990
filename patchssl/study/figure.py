"""The figure of a study, from its study.json."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from patchssl.report.plots.differences import Gap, GapPanel, plot_differences
from patchssl.runtime.errors import DataError, UsageError, unknown_choice
from patchssl.study.config import UNTRAINED
from patchssl.study.tables import STEM


class _DifferenceRow(BaseModel):
    mean: float
    low: float | None
    high: float | None
    significant: bool


class _MeasureRows(BaseModel):
    title: str
    mean: float
    by_seed: dict[str, float]
    difference: _DifferenceRow | None  # to what the variant is compared with


class _Variant(BaseModel):
    variant: str
    measures: list[_MeasureRows]
    compared_with: str | None


class _StudyJson(BaseModel):
    reference: str
    variants: list[_Variant]


def draw_study(folder: Path, out: Path, reference: str | None = None) -> Path:
    """Write the differences of all variants that are compared with `reference` (by default the study's) in `folder`.

    Measure by measure, from study.json. The untrained network, which would stretch the axes, is skipped.
    UsageError where there is no study.json, or nothing to compare; DataError for a damaged one.
    """
    path = folder / f"{STEM}.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no {path.name}; it is written by: patchssl study")
    try:
        study = _StudyJson.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path} is damaged ({'.'.join(map(str, first['loc'])) or 'all'}: {first['msg']}); "
                        "make it anew with patchssl study") from None
    found = {variant.variant: {measure.title: measure for measure in variant.measures} for variant in study.variants}
    compared = {variant.variant: variant.compared_with for variant in study.variants if variant.compared_with}
    if reference is not None and reference not in compared.values():
        raise UsageError(unknown_choice("variant that others are compared with", reference,
                                        dict.fromkeys(compared.values())))
    reference = reference or study.reference
    own = found.get(reference, {})
    others = [name for name, other in compared.items() if other == reference and name != UNTRAINED]
    panels = [GapPanel(title, measure.mean, [_gap(name, found[name][title], measure) for name in others
                                             if title in found[name] and found[name][title].difference])
              for title, measure in own.items()]
    return plot_differences([panel for panel in panels if panel.gaps], reference, out,
                            note="small circles: seeds; bars: 95 % interval of the mean; filled: significant among "
                                 "all tests of the study's table (Holm)")


def _gap(variant: str, theirs: _MeasureRows, own: _MeasureRows) -> Gap:
    gap = theirs.difference
    assert gap is not None
    seeds = sorted(theirs.by_seed.keys() & own.by_seed.keys())
    return Gap(variant, gap.mean, gap.low, gap.high, [theirs.by_seed[seed] - own.by_seed[seed] for seed in seeds],
               gap.significant)
