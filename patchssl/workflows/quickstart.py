"""The quickstart: from nothing to a pretrained network, its score beside a random one's, a table and figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from patchssl.data.open import open_pair
from patchssl.eval.knn.task import evaluate_knn, evaluate_pixels
from patchssl.eval.tasks import ComputeOptions
from patchssl.models.backbone import Backbone
from patchssl.models.checkpoint import load_checkpoint
from patchssl.models.load import load_backbone, untrained_backbone
from patchssl.models.networks import NetworkSpec
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.recipe import load_recipe
from patchssl.pretrain.run.resume import changes_between, sentence
from patchssl.report.figures.draw import draw_attention, draw_curves, draw_matches, draw_views
from patchssl.report.tables.make import make_tables
from patchssl.runtime.console import Console
from patchssl.runtime.device import default_device
from patchssl.runtime.errors import UsageError
from patchssl.runtime.lock import locked
from patchssl.runtime.seeds import require_seed
from patchssl.workflows.probe import pretrain_with_probe, resume_with_probe, run_facts

PROTOCOL = "native"
FIGURE_IMAGES = 4


@dataclass(frozen=True)
class QuickstartSummary:
    """What the quickstart made."""

    run: str
    table: str  # Markdown
    files: list[str]
    top1: dict[str, float]  # 20-NN top-1 as a fraction, by row
    gain: float  # pretrained over random, as a fraction

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    def text(self) -> str:
        """For people: the table, and where everything is."""
        listed = "\n".join(f"  {path}" for path in self.files)
        return (f"{self.table}\n\nPretraining gained {100 * self.gain:+.1f} points of 20-NN top-1 over the random "
                f"network.\n\nWritten:\n  {self.run}\n{listed}")


def run_quickstart(out: Path, seed: int, recipe: str, overrides: tuple[str, ...], *, device: str | None,
                   console: Console) -> QuickstartSummary:
    """Pretrain (or resume an interrupted quickstart in `out`), score, tabulate and draw."""
    with locked(out):
        return _run_quickstart(out, seed, recipe, overrides, device, console)


def _run_quickstart(out: Path, seed: int, recipe: str, overrides: tuple[str, ...], device: str | None,
                    console: Console) -> QuickstartSummary:
    require_seed(seed)
    effective = load_recipe(recipe, overrides)
    if effective.data is None:
        raise UsageError(f"recipe {recipe} names no data: add data=FOLDER (with train/ and val/ of class folders)")
    chosen = default_device(device)
    train, val = open_pair(effective.data)
    for images in (train, val):
        images.require_labels()  # said before the pretraining, not after it
    run = pretrain_or_resume(out / "run", recipe, effective, seed, overrides, device, console)
    backbone = load_backbone(str(run), chosen)
    compute = ComputeOptions(progress=console)
    pixels = evaluate_pixels(train, val, effective.views.global_size, compute=compute)
    results = {"raw pixels": pixels}
    for name, network in (("random network", untrained_copy(run, chosen)), ("pretrained", backbone)):
        results[name] = evaluate_knn(network, train, val, PROTOCOL, compute=compute)
    files = [result.write(out / "results") for result in results.values()]
    table, table_files, _ = make_tables(out / "results", out)
    top1 = {name: result.metrics["top1@20"] for name, result in results.items()}
    figures = []
    try:
        figures = draw_all(out / "figures", run, effective, backbone, top1, seed)
    except Exception as error:  # run, records and table are there
        console.say(f"warning: no figures, the rest is there: {' '.join(str(error).split()) or type(error).__name__}")
    return QuickstartSummary(str(run), table, [str(path) for path in [*files, *table_files, *figures]], top1,
                             top1["pretrained"] - top1["random network"])


def pretrain_or_resume(folder: Path, name: str, recipe: Recipe, seed: int, overrides: tuple[str, ...],
                       device: str | None, console: Console) -> Path:
    """A finished run in `folder`: the one that is there, that one resumed, or a new one."""
    if not (folder / "recipe.yaml").exists():
        return pretrain_with_probe(name, None, folder, seed, overrides, device=device, console=console,
                                   name=f"{Path(name).stem}-{seed}")
    there, _, its_seed = run_facts(folder)
    changes = changes_between(there, recipe) | ({"seed": (its_seed, seed)} if its_seed != seed else {})
    if changes:
        said = "; ".join(sentence({key: both}) for key, both in changes.items())
        raise UsageError(f"{folder} holds a quickstart of another recipe or seed ({said}); choose "
                         "another --out, or ask for what it was made with")
    return resume_with_probe(folder, device=device, console=console)


def untrained_copy(run: Path, device: torch.device) -> Backbone:
    """The untrained network that the run in `run` began with."""
    checkpoint = load_checkpoint(run)
    backbone = untrained_backbone(NetworkSpec(**checkpoint["network"]), checkpoint["origin"]["seed"])
    return backbone.to(device).eval().requires_grad_(False)


def draw_all(folder: Path, run: Path, recipe: Recipe, backbone: Backbone, top1: dict[str, float],
             seed: int) -> list[Path]:
    """The figures: curves with the other rows as lines, attention, matches between two views, a sheet of views."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [f"{recipe.data}:{index}" for index in range(FIGURE_IMAGES)]
    # the curve's own points classify training images: say that these lines do not
    references = {f"{name}, test set": value for name, value in top1.items()}
    return [draw_curves(run, folder / "curves.png", references),
            draw_attention(backbone, images, folder / "attention.png", size=2 * backbone.image_size),
            draw_matches(images[0], recipe, folder / "matches.png", seed=seed),
            draw_views(images, recipe, folder / "views.png", seed=seed)]
