"""The model card of an export: what the network is, how it was trained, how good it is, and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from patchssl import __version__
from patchssl.eval.records import Result, plain_text
from patchssl.eval.tasks import table_metrics
from patchssl.export.dino import DINO_FILE, dino_arguments, exported_network
from patchssl.export.onnx import ONNX_FILE
from patchssl.export.source import ExportSource, Written
from patchssl.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from patchssl.models.networks import pretrained_config
from patchssl.report.tables.scores import METHODS
from patchssl.runtime.errors import UsageError
from patchssl.runtime.yamltext import load_yaml

CARD_FILE = "README.md"
NOT_STATED = "not stated"
# datasets by what we call them, and where the Hugging Face hub has them
_HUB_DATASETS = {"ImageNet-1K": "ILSVRC/imagenet-1k", "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100",
                 "fashion-mnist": "zalando-datasets/fashion_mnist"}
_PATHS_IN_RECIPE = ("data", "init")
_DINO_CODE = """from functools import partial

import utils
import vision_transformer as vits
from torch import nn

model = vits.VisionTransformer({arguments},
                               qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)).eval()
utils.load_pretrained_weights(model, "{file}", "{network}", "{arch}", {patch_size})"""
_TIMM_CODE = """import timm
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)
# embedding = model(transform(image)[None]), of the shape (1, {dim})"""
_OWN_CODE = """import patchssl

backbone = patchssl.load_backbone(".")
# backbone.features(images) and backbone.tokens(images) take normalized images of the shape (batch, 3, height, width)"""
_ONNX_CODE = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
images = np.zeros((1, 3, {size}, {size}), dtype=np.float32)  # normalized as above
embedding = session.run(["embedding"], {{"image": images}})[0]  # (1, {dim})"""


def model_card(source: ExportSource, dim: int, written: Mapping[str, Written], license: str | None,
               records: Sequence[Result]) -> str:
    """The card as Markdown with the hub's front matter.

    `dim` are the numbers of one feature vector, `written` the formats, `records` scores of these weights.
    """
    sections = [_front_matter(source, written, license), f"# {_plain(source.backbone.name)}", _summary(source),
                "## Training", _training(source), "## Scores", _scores(records), "## Files and loading",
                _normalization(source.backbone), *_loading(source, dim, written), "## License",
                _license(source, license)]
    return "\n\n".join(sections) + "\n"


def _front_matter(source: ExportSource, written: Mapping[str, Written], license: str | None) -> str:
    backbone = source.backbone
    facts: dict[str, Any] = {"license": license} if license else {}
    learned = ["self-supervised-learning"] if backbone.method in ("pwself", "dino", "ibot") else []
    library = next((name for name in ("timm", "onnx") if name in written), "pytorch")
    facts |= {"library_name": library, "pipeline_tag": "image-feature-extraction",
              "tags": ["image-feature-extraction", *written, "patchssl", *learned, backbone.method]}
    if backbone.pretrain_data in _HUB_DATASETS:
        facts["datasets"] = [_HUB_DATASETS[backbone.pretrain_data]]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---"


def _summary(source: ExportSource) -> str:
    backbone, size = source.backbone, source.backbone.image_size
    count = sum(parameter.numel() for parameter in backbone.module.parameters())
    return (f"An image backbone: {_plain(backbone.arch)}, {count:,} parameters, for images of {size} x {size} pixels. "
            f"It turns an image into a vector and has no classifier. {_where_from(source)}")


def _where_from(source: ExportSource) -> str:
    if source.of_run:
        return f"Trained with patchssl, and exported by its version {__version__}."
    if source.uri.startswith(("timm:", "hf-hub:", "py:", "random:")):
        where = f"`{source.uri}`"
    else:
        where = f"the file `{PurePath(source.file.path).name}`" if source.file else "an earlier export"
    return f"The weights are those of {where}, exported with patchssl {__version__}."


def _training(source: ExportSource) -> str:
    backbone = source.backbone
    epochs = NOT_STATED if backbone.pretrain_epochs is None else f"{backbone.pretrain_epochs:g}"
    lines = [f"- Method: {METHODS.get(backbone.method, NOT_STATED)}",
             f"- Data: {_plain(backbone.pretrain_data or NOT_STATED)}", f"- Epochs: {epochs}",
             f"- Seed: {NOT_STATED if backbone.seed is None else backbone.seed}",
             f"- sha256 of the weights, by which records name them: `{backbone.weights_sha256}`"]
    if recipe := portable_recipe(source):
        lines += ["", "The recipe of the run:", "", _code("yaml", yaml.safe_dump(recipe, sort_keys=False))]
    return "\n".join(lines)


def portable_recipe(source: ExportSource) -> dict[str, Any]:
    """The recipe of a run, full paths of its machine cut to their last part; empty for what is no run of ours."""
    text = source.file.rest.get("recipe") if source.of_run and source.file else None
    try:
        recipe = load_yaml(text, "recipe") if isinstance(text, str) else None
    except UsageError:
        return {}
    if not isinstance(recipe, dict):
        return {}
    for name in _PATHS_IN_RECIPE:
        if isinstance(value := recipe.get(name), str) and PurePath(value).is_absolute():
            recipe[name] = PurePath(value).name
    return recipe


def _scores(records: Sequence[Result]) -> str:
    rows = dict.fromkeys(row for record in records for row in _score_rows(record))
    if not rows:
        return "No records of these weights were given."
    header = ("Task", "Data set", "Protocol", "Metric", "Score, %")
    lines = [f"| {' | '.join(row)} |" for row in (header, ("---", "---", "---", "---", "---:"), *sorted(rows))]
    return "\n".join(lines)


def _score_rows(record: Result) -> Iterable[tuple[str, ...]]:
    """A row per headline metric of the record's task, or per metric of a task that has none."""
    for metric in table_metrics().get(record.task, tuple(record.metrics)):
        if metric in record.metrics:
            words = (record.task, record.dataset, record.protocol, metric)
            yield (*map(_plain, words), f"{100 * record.metrics[metric]:.1f}")


def _normalization(backbone: Backbone) -> str:
    size, mean, std = backbone.image_size, list(backbone.mean), list(backbone.std)
    return (f"Images are red, green and blue in [0, 1], {size} x {size} pixels, then normalized by mean {mean} and std "
            f"{std}. The code below runs inside this folder.")


def _loading(source: ExportSource, dim: int, written: Mapping[str, Written]) -> Iterable[str]:
    size = source.backbone.image_size
    if "timm" in written:
        yield "### timm"
        yield _code("python", _TIMM_CODE.format(dim=dim))
        yield (f"From the hub it is `hf-hub:ORG/NAME` instead of `local-dir:.`. At {size} pixels this gives the same "
               f"numbers as patchssl. {_positions_note(source.backbone)}".rstrip())
        yield "### patchssl"
        yield _code("python", _OWN_CODE)
    if "dino" in written:
        yield "### DINO"
        yield _code("python", _dino_code(source))
        heads, network = dino_arguments(source.backbone)["num_heads"], exported_network(source)
        yield (f"`utils` and `vision_transformer` are those of facebookresearch/dino. {_scripts_note(source)} patchssl "
               f"reads the file as `{DINO_FILE}#{network}?heads={heads}{_normalization_options(source.backbone)}`.")
    if "onnx" in written:
        yield "### ONNX"
        yield _code("python", _ONNX_CODE.format(file=ONNX_FILE, size=size, dim=dim))
    for result in written.values():
        yield from (f"{note[0].upper()}{note[1:]}." for note in result.notes)


def _positions_note(backbone: Backbone) -> str:
    if not getattr(backbone, "dino_positions", False):
        return ""
    return ("At other sizes (`img_size=...`, `dynamic_img_size=True`) timm resizes the position embeddings in another "
            "way than DINO, as this network was trained: the features differ. patchssl and DINO's code give those of "
            "the training.")


def _dino_code(source: ExportSource) -> str:
    arguments = dino_arguments(source.backbone)
    arch = arguments.pop("arch", "vit")
    listed = ", ".join(f"{name}={value}" for name, value in arguments.items())
    return _DINO_CODE.format(arguments=listed, file=DINO_FILE, network=exported_network(source), arch=arch,
                             patch_size=arguments["patch_size"])


def _normalization_options(backbone: Backbone) -> str:
    """The options that say mean and std of a file that cannot; none for ImageNet's."""
    if (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD):
        return ""
    mean, std = (",".join(f"{value:g}" for value in values) for values in (backbone.mean, backbone.std))
    return f"&mean={mean}&std={std}"


def _scripts_note(source: ExportSource) -> str:
    """How DINO's scripts take the file, where they can build the network."""
    arguments = dino_arguments(source.backbone)
    if "arch" not in arguments or arguments["img_size"] != [224]:
        return "Its scripts build networks for 224 pixels in three sizes and cannot take this one as they are."
    return (f"Its scripts take `--arch {arguments['arch']} --patch_size {arguments['patch_size']} --pretrained_weights "
            f"{DINO_FILE} --checkpoint_key {exported_network(source)}`.")


def _license(source: ExportSource, license: str | None) -> str:
    said = f"As stated by who made this export: {_plain(license)}." if license else "The license is not stated."
    if start := portable_recipe(source).get("init"):
        return f"{said} The training started from {_plain(str(start))}: the license of its authors may hold as well."
    if source.of_run or source.uri.startswith(("random:", "py:")):
        return said
    config = pretrained_config(source.uri.removeprefix("timm:")) if source.uri.startswith("timm:") else None
    known = f" timm's record of them says {config['license']}." if config and config.get("license") else ""
    return f"{said} The weights come from elsewhere: the license of their authors holds.{known}"


def _code(language: str, text: str) -> str:
    """A block of code, whatever `text` holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _plain(text: str) -> str:
    """`text` as words on one line that Markdown does not read as anything else."""
    words = " ".join(plain_text(text).split())
    return "".join(f"\\{sign}" if sign in "\\`*<>[]|#" else sign for sign in words)
