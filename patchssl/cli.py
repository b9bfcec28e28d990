"""The command line: parse, call one function, print. Results on stdout, progress and errors on stderr.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from patchssl import __version__
from patchssl.errors import PatchSSLError, UsageError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Pretrain Vision Transformers patch-wise on unlabeled images, and say how good a backbone is.")
eval_app = typer.Typer(no_args_is_help=True, help="Score a backbone under a named protocol.")
plot_app = typer.Typer(no_args_is_help=True, help="Draw attention, matches, views and training curves.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed against a peer or a floor, in one run.")
app.add_typer(eval_app, name="eval")
app.add_typer(plot_app, name="plot")
app.add_typer(bench_app, name="bench")


def _not_empty(data: str | None) -> str | None:
    """`--data "$UNSET"` must not fall back to the recipe's own data."""
    if data == "":
        raise UsageError("--data is empty; name a folder of images or a set, such as textures")
    return data


ModelArg = Annotated[str, typer.Argument(
    metavar="MODEL", help="timm:NAME, random:NAME?img_size=..., a run folder, a checkpoint (PATH#student), or "
                          "pixels?img_size=...")]
DataOpt = Annotated[str, typer.Option("--data", callback=_not_empty, help="Folder of images (train/ and val/ inside), "
                                                                          "or a set's name: textures, textures-64.")]
ResultsOpt = Annotated[Path, typer.Option("--results", help="Folder that gets the record.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
DeviceOpt = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
SeedOpt = Annotated[int, typer.Option("--seed", min=0, help="Fixes every random draw.")]
OutFileOpt = Annotated[Path, typer.Option("--out", help="Figure to write: .png, .svg or .pdf.")]
ImagesArg = Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, or SET:INDEX as in textures:7.")]
RecipeOpt = Annotated[str, typer.Option("--recipe", help="Recipe, YAML file or run folder whose views are drawn.")]
OverridesArg = Annotated[list[str] | None, typer.Argument(
    metavar="KEY=VALUE", help="Changes to the recipe, such as optim.epochs=20.")]
ViewsOfOpt = Annotated[str | None, typer.Option("--model", help="Take patch and view size from this MODEL.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"patchssl {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                 help="Print the version.")] = False) -> None:
    """Pretrain Vision Transformers patch-wise on unlabeled images, and say how good a backbone is."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder for run, records, table, figures.")] = Path("quickstart"),
    seed: SeedOpt = 0,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe to pretrain with.")] = "quickstart",
    overrides: OverridesArg = None,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """From nothing to a pretrained network, its k-NN score, a table and figures: five minutes on two CPU cores."""
    from patchssl.console import Console
    from patchssl.quickstart import run_quickstart

    with Console() as console:
        summary = run_quickstart(out, seed, recipe, tuple(overrides or ()), device=device, console=console)
    typer.echo(json.dumps(summary.as_dict(), indent=2) if as_json else summary.text())


@app.command()
def pretrain(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe or a YAML file; not needed "
                                                                          "with --resume.")] = None,
    overrides: OverridesArg = None,
    data: Annotated[str | None, typer.Option("--data", callback=_not_empty,
                                             help="Folder of images, or a set's name.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/<recipe>-<seed>.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0,
                                             help="Fixes every random draw; default 0.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Run folder to go on with, by itself.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print images, steps, memory, time; no training.")] = False,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Pretrain a Vision Transformer with PW-Self or DINO."""
    from patchssl.console import Console
    from patchssl.workflows import pretrain_with_probe, resume_with_probe

    changes = tuple(overrides or ())
    with Console() as console:
        if resume is not None:
            if recipe or data is not None or out or seed is not None or dry_run:
                raise UsageError("--resume RUN takes no recipe, key=value, --data, --out, --seed or --dry-run: "
                                 "recipe, data and seed are those of the run")
            folder = resume_with_probe(resume, device=device, console=console)
        elif recipe is None or "=" in recipe:
            raise UsageError(f"name a recipe first ({', '.join(_shipped_recipes())}), a YAML file, or --resume RUN")
        elif dry_run:
            _print_plan(recipe, changes, data, seed or 0, device, as_json)
            return
        else:
            folder = pretrain_with_probe(recipe, data, out, seed or 0, changes, device=device, console=console)
    if as_json:
        typer.echo(json.dumps({"run": str(folder)}))
    else:
        typer.echo(f"{folder}\nscore it: patchssl eval knn {folder} --data DIR")


@eval_app.command()
def knn(
    model: ModelArg,
    data: DataOpt,
    protocol: Annotated[str | None, typer.Option("--protocol", help="dino or native; default: dino for models "
                                                                       "trained at 224 px, else native.")] = None,
    results: ResultsOpt = Path("results"),
    device: DeviceOpt = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")] = 64,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that decode images.")] = 2,
    as_json: JsonOpt = False,
) -> None:
    """k-NN classification on frozen features: vote of the nearest training images."""
    from patchssl.console import Console
    from patchssl.workflows import score_knn

    with Console() as console:
        result = score_knn(model, data, protocol, device=device, batch_size=batch_size, workers=workers,
                           console=console)
    path = result.write(results)
    if as_json:
        typer.echo(path.read_text(), nl=False)
    else:
        top1, top5 = (result.metrics[name] for name in ("top1@20", "top5@20"))
        typer.echo(f"{result.model} on {result.dataset}, protocol {result.protocol}: 20-NN top-1 {top1:.1%}, "
                   f"top-5 {top5:.1%}\nwritten to {path}")


@app.command()
def tables(
    results: ResultsOpt = Path("results"),
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the table files; default: --results.")] = None,
) -> None:
    """Comparison tables (Markdown and CSV) from the records in a folder."""
    from patchssl.workflows import make_tables

    text, paths, problems = make_tables(results, out or results)
    typer.echo(text)
    typer.echo("written to " + ", ".join(str(path) for path in paths), err=True)
    for problem in problems:
        typer.echo(f"left out: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


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


@bench_app.command("views")
def bench_views(image: Annotated[Path | None, typer.Option("--image", help="A photograph; default: one made up, "
                                                                             "500 x 375 pixels.")] = None) -> None:
    """Crops and color of one image against lightly's and torchvision's transforms; JSON on stdout."""
    from patchssl import bench

    typer.echo(json.dumps(bench.bench_views(image), indent=2))


@bench_app.command("matching")
def bench_matching() -> None:
    """Patch matching of a batch against similarity matching; JSON on stdout."""
    from patchssl import bench

    typer.echo(json.dumps(bench.bench_matching(), indent=2))


@app.command()
def doctor(as_json: JsonOpt = False) -> None:
    """What is installed and what will be used: torch, devices, FAISS, extras, cache folders."""
    from patchssl import doctor as examination

    findings = examination.diagnose()
    typer.echo(examination.as_json(findings) if as_json else examination.as_text(findings))
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


def _shipped_recipes() -> list[str]:
    from patchssl.pretrain.config import recipe_names

    return recipe_names()


def _print_plan(recipe: str, overrides: tuple[str, ...], data: str | None, seed: int, device: str | None,
                as_json: bool) -> None:
    from patchssl.workflows import plan_pretraining

    plan = plan_pretraining(recipe, data, seed, overrides, device=device)
    typer.echo(json.dumps(plan.as_dict(), indent=2) if as_json else plan.text())


def main() -> None:
    """Entry point: errors become a sentence and an exit code, a traceback only with PATCHSSL_DEBUG=1."""
    # torch's threads wait by spinning; on a busy machine that costs 20 times the work (read when torch is imported)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except Exception as error:
        if os.environ.get("PATCHSSL_DEBUG") == "1":
            raise
        print(f"patchssl: {_sentence(error)}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, PatchSSLError) else 1)


def _sentence(error: Exception) -> str:
    if isinstance(error, PatchSSLError):
        return str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be used: {error.strerror}"
    return (f"this should not happen, please report it: {type(error).__name__}: {error} "
            "(PATCHSSL_DEBUG=1 shows where)")
