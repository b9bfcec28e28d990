"""`patchssl plot ...`: figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchssl.cli.options import (
    DeviceOpt,
    ImagesArg,
    ModelArg,
    OutFileOpt,
    RecipeOpt,
    RecordsOpt,
    SeedOpt,
    ViewsOfOpt,
    echo,
    renamed,
    say_skipped,
)
from patchssl.runtime.errors import UsageError

SideOfImagesOpt = Annotated[int | None, typer.Option("--size", min=8, help="Short side in pixels; default: as in "
                                                                           "training.")]
MassOpt = Annotated[float, typer.Option("--mass", min=0.01, max=1.0, help="Share of the attention whose patches are "
                                                                          "shown.")]
MatchModelsOpt = Annotated[list[str] | None, typer.Option(
    "--model", metavar="MODEL", help="Match by this model's tokens; may be given often. With --rule center or paper: "
                                     "its patch and view size.")]
RuleOpt = Annotated[str | None, typer.Option(
    "--rule", help="center or paper: by geometry, views as in training; similarity: by tokens, views as in 'eval "
                   "patches'. Default: similarity with --model, else the recipe's.")]
ColorOpt = Annotated[str | None, typer.Option("--color", help="What colors of token matches mean: right, similarity or "
                                                              "place.")]
PatchwiseOpt = Annotated[str | None, typer.Option(
    "--patchwise", metavar="none|layered|replace|all", help="Color every view so, not as the recipe says; all: the "
                                                            "first views under each, and what layered adds to none.")]
plot_app = typer.Typer(no_args_is_help=True, help="Draw attention, patch tokens, matches, views, training curves, "
                                                  "robustness, studies.")


def _say(sentence: str) -> None:
    echo(sentence, err=True)


@plot_app.command()
def attention(
    model: ModelArg,
    images: ImagesArg,
    size: SideOfImagesOpt = None,
    mass: MassOpt = 0.6,
    out: OutFileOpt = Path("attention.png"),
    device: DeviceOpt = None,
) -> None:
    """Attention of the class token to the patches, per head and on average, in the last block.

    Below the maps, over the image, the fewest patches that hold --mass of it.
    """
    from patchssl.report.figures.draw import draw_attention
    from patchssl.runtime.device import default_device

    echo(draw_attention(model, images, out, size=size, mass=mass, device=default_device(device), say=_say))


@plot_app.command(cls=renamed({"--beside": "--compare"}))
def pca(
    model: ModelArg,
    images: ImagesArg,
    others: Annotated[list[str] | None, typer.Option("--compare", metavar="MODEL", help="Another model, drawn below; "
                                                                                        "may be given often.")] = None,
    size: SideOfImagesOpt = None,
    out: OutFileOpt = Path("pca.png"),
    device: DeviceOpt = None,
) -> None:
    """Patch tokens of all images together as colors, by their three main components: alike tokens look alike."""
    from patchssl.report.figures.draw import draw_pca
    from patchssl.runtime.device import default_device

    echo(draw_pca([model, *(others or ())], images, out, size=size, device=default_device(device), say=_say))


@plot_app.command()
def matches(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file, or SET:INDEX as in textures:7.")],
    other: Annotated[str | None, typer.Argument(metavar="[IMAGE]", help="A second one to match it with.")] = None,
    models: MatchModelsOpt = None,
    rule: RuleOpt = None,
    recipe: RecipeOpt = "quickstart",
    color: ColorOpt = None,
    lines: Annotated[int, typer.Option("--lines", min=1, help="How many token matches to draw, best first.")] = 30,
    size: SideOfImagesOpt = None,
    seed: SeedOpt = 0,
    out: OutFileOpt = Path("matches.png"),
    device: DeviceOpt = None,
) -> None:
    """Patches that show the same place in two views of an image, or that models take for the same.

    By geometry both have the same number and color. By tokens lines join patches that are each other's nearest, and
    between two views of one image the figure says how many are right.
    """
    chosen = models or []
    by_tokens = bool(chosen) and rule in (None, "similarity")
    if not by_tokens and (other or rule == "similarity" or len(chosen) > 1):
        raise UsageError("two images, and the rule similarity, need --model: its tokens are compared" if not chosen else
                         f"the rule {rule} knows geometry: one image, at most one --model")
    if size and other is None:
        raise UsageError("--size is for two images; views of one are as large as the model's training images")
    if not by_tokens:
        from patchssl.report.figures.draw import draw_matches, recipe_of

        echo(draw_matches(image, recipe_of(recipe, chosen[0] if chosen else None, rule), out, seed=seed))
        return
    from patchssl.report.figures.matches import draw_image_matches, draw_view_matches
    from patchssl.runtime.device import default_device

    where = default_device(device)
    if other is None:
        echo(draw_view_matches(chosen, image, out, seed=seed, color=color, lines=lines, device=where, say=_say))
    else:
        echo(draw_image_matches(chosen, (image, other), out, size=size, color=color, lines=lines, device=where,
                                say=_say))


@plot_app.command()
def views(images: ImagesArg, recipe: RecipeOpt = "quickstart", model: ViewsOfOpt = None, seed: SeedOpt = 0,
          patchwise: PatchwiseOpt = None, out: OutFileOpt = Path("views.png")) -> None:
    """The augmented views that a network is trained on, one row per image, and how they are colored.

    Views that were colored patch by patch say so.
    """
    from patchssl.report.figures.draw import draw_views, recipe_of

    echo(draw_views(images, recipe_of(recipe, model), out, seed=seed, patchwise=patchwise))


@plot_app.command()
def curves(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    others: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Further ones.")] = None,
    out: OutFileOpt = Path("curves.png"),
) -> None:
    """Loss, k-NN, entropy and effective rank of a run, or of several beside each other."""
    from patchssl.report.figures.draw import draw_curves

    echo(draw_curves(run, out, others=others or (), say=_say))


@plot_app.command()
def robustness(
    results: RecordsOpt = Path("results"),
    dataset: Annotated[str | None, typer.Option("--set", metavar="NAME", help="Only this set's records.")] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="Only records under this protocol.")] = None,
    out: OutFileOpt = Path("robustness.png"),
) -> None:
    """Copy detection against JPEG quality and the share of the image cut away, from the Copydays records in a folder.

    One line per model, the mean with its 95 % interval where seeds differ alone; strong copies beside.
    """
    from patchssl.report.figures.draw import draw_robustness

    path, problems = draw_robustness(results, out, dataset=dataset, protocol=protocol)
    echo(path)
    say_skipped(problems)


@plot_app.command(cls=renamed({"--beside": "--compare"}))
def study(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a study, where its study.json is.")],
    out: OutFileOpt = Path("study.png"),
    compared_with: Annotated[str | None, typer.Option("--compare", metavar="VARIANT", help=(
        "Those compared with this variant: the ablations, with the one they change. Default: the reference."))] = None,
) -> None:
    """Differences of a study's variants to its reference: every seed, the mean and its 95 % interval."""
    from patchssl.study.figure import draw_study

    echo(draw_study(folder, out, compared_with))


@plot_app.command("attention-video")
def attention_video(
    model: ModelArg,
    frames: Annotated[Path, typer.Argument(metavar="FRAMES", help="Folder of images, in the order of the numbers in "
                                                                  "their names, or a video file.")],
    size: SideOfImagesOpt = None,
    mass: MassOpt = 0.6,
    every: Annotated[int, typer.Option("--every", min=1, help="Take every so many-th frame.")] = 1,
    rate: Annotated[float | None, typer.Option("--fps", min=0.1, max=120, help="Frames per second; default: the "
                                                                              "video's, 10 for a folder.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Video to write: .mp4, .gif or .webp.")] = Path("attention.gif"),
    device: DeviceOpt = None,
) -> None:
    """Attention of the class token over the frames of a video, and the fewest patches that hold --mass of it.

    Reading video files and writing .mp4 needs pip install 'patchssl[video]'.
    """
    from patchssl.report.figures.video import draw_attention_video
    from patchssl.runtime.console import Console
    from patchssl.runtime.device import default_device

    with Console() as console:
        draw_attention_video(model, frames, out, size=size, mass=mass, every=every, rate=rate,
                             device=default_device(device), console=console)
    echo(out)
