"""`patchssl plot ...`: figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchssl.commands.options import (
    DeviceOpt,
    ImagesArg,
    ModelArg,
    OutFileOpt,
    RecipeOpt,
    RecordsOpt,
    SeedOpt,
    ViewsOfOpt,
)

plot_app = typer.Typer(no_args_is_help=True, help="Draw attention, patch tokens, matches, views and training curves.")


@plot_app.command()
def attention(
    model: ModelArg,
    images: ImagesArg,
    size: Annotated[int | None, typer.Option("--size", min=8, help="Short side in pixels.")] = None,
    out: OutFileOpt = Path("attention.png"),
    device: DeviceOpt = None,
) -> None:
    """Attention of the class token to the patches, per head and on average, in the last block."""
    from patchssl.drawing import draw_attention
    from patchssl.workflows import default_device

    typer.echo(draw_attention(model, images, out, size=size, device=default_device(device)))


@plot_app.command()
def pca(
    model: ModelArg,
    images: ImagesArg,
    size: Annotated[int | None, typer.Option("--size", min=8, help="Short side in pixels.")] = None,
    out: OutFileOpt = Path("pca.png"),
    device: DeviceOpt = None,
) -> None:
    """Patch tokens of all images together as colors, by their three main components: alike tokens look alike."""
    from patchssl.drawing import draw_pca
    from patchssl.workflows import default_device

    typer.echo(draw_pca(model, images, out, size=size, device=default_device(device)))


@plot_app.command()
def matches(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file, or SET:INDEX as in textures:7.")],
    recipe: RecipeOpt = "quickstart",
    model: ViewsOfOpt = None,
    rule: Annotated[str | None, typer.Option("--rule", help="center or paper; default: the recipe's.")] = None,
    seed: SeedOpt = 0,
    out: OutFileOpt = Path("matches.png"),
) -> None:
    """Patches that show the same place in two views of an image, with the same number and color."""
    from patchssl.drawing import draw_matches, recipe_of

    typer.echo(draw_matches(image, recipe_of(recipe, model, rule), out, seed=seed))


@plot_app.command()
def views(images: ImagesArg, recipe: RecipeOpt = "quickstart", model: ViewsOfOpt = None, seed: SeedOpt = 0,
          out: OutFileOpt = Path("views.png")) -> None:
    """The augmented views that a network is trained on, one row per image."""
    from patchssl.drawing import draw_views, recipe_of

    typer.echo(draw_views(images, recipe_of(recipe, model), out, seed=seed))


@plot_app.command()
def curves(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
           out: OutFileOpt = Path("curves.png")) -> None:
    """Loss, k-NN, entropy and effective rank of a run."""
    from patchssl.drawing import draw_curves

    typer.echo(draw_curves(run, out))


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
    from patchssl.drawing import draw_robustness

    path, problems = draw_robustness(results, out, dataset=dataset, protocol=protocol)
    typer.echo(path)
    for problem in problems:
        typer.echo(f"left out: {problem}", err=True)
    if problems:
        raise typer.Exit(1)
