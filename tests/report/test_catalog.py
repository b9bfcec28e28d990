"""The catalog against timm itself, against `published.csv`, and as a reader sees it."""

import csv
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from cases import each

import patchssl
from patchssl.report.catalog import BENCHMARKS, as_json, as_text, known_models, published_scores
from patchssl.report.tables.published import read_published
from patchssl.runtime.errors import UsageError

FILE = Path(patchssl.__file__).parent / "report" / "models.csv"
MODELS = known_models()
OF_TIMM = [model for model in MODELS if model.uri and model.uri.startswith("timm:")]
FILES = [model for model in MODELS if not model.uri]


def timm_name(model):
    return model.uri.removeprefix("timm:")


def one(pattern):
    """The model whose name is exactly `pattern`."""
    (found,) = [model for model in MODELS if model.name == pattern]
    return found


@cache
def sizes(name):
    """Parameters without classifier, patch and image size of what timm builds, without making its weights."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    params = sum(weights.numel() for weights in network.parameters())
    if not hasattr(network, "patch_embed"):  # a convolutional network
        return params, None, timm.get_pretrained_cfg(name).input_size[1]
    assert network.cls_token is not None
    return params, network.patch_embed.patch_size[0], network.patch_embed.img_size[0]


def test_every_row_of_the_file_is_read():
    with FILE.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert len(MODELS) == len(lines) - 1
    assert [model.name for model in MODELS] == [line[1] for line in lines[1:]]


def test_every_timm_name_has_weights_in_timm():
    assert len(OF_TIMM) > 50
    assert {timm_name(model) for model in OF_TIMM} - set(timm.list_pretrained()) == set()


@each("pattern", ["vit_*.dino", "vit_*_dinov2.*", "vit_*.mae"])
def test_no_backbone_of_these_methods_is_forgotten(pattern):
    assert set(timm.list_pretrained(pattern)) <= {timm_name(model) for model in OF_TIMM}


@pytest.mark.slow
@each("model", OF_TIMM, ids=timm_name)
def test_sizes_and_license_are_those_of_timm(model):
    name = timm_name(model)
    assert model.architecture == name.partition(".")[0]
    assert (model.params, model.patch_size, model.image_size) == sizes(name)
    license = timm.get_pretrained_cfg(name).license
    assert license is None or model.license == license


def test_official_files_of_timm_s_networks_are_the_ones_timm_was_made_from():
    with_file = [model for model in OF_TIMM if model.url]
    assert len(with_file) > 15
    assert {model.uri: model.url for model in with_file} == \
        {model.uri: timm.get_pretrained_cfg(timm_name(model)).url for model in with_file}


@each("model", FILES, ids=lambda model: model.name)
def test_an_official_file_states_the_sizes_of_its_architecture(model):
    assert model.url.startswith("https://")
    assert model.url.endswith(".pth")
    assert (model.params, model.patch_size, model.image_size) == sizes(model.architecture)
    assert model.license == "apache-2.0"


def test_untrained_networks_have_the_sizes_of_their_architecture():
    untrained = [model for model in MODELS if model.method == "random"]
    assert untrained
    for model in untrained:
        assert model.uri == f"random:{model.architecture}"
        assert (model.params, model.patch_size, model.image_size) == sizes(model.architecture)


def test_nothing_is_listed_twice():
    assert len({model.name for model in MODELS}) == len(MODELS)
    assert len({model.uri or model.url for model in MODELS}) == len(MODELS)


def test_what_was_not_found_is_none_and_not_a_guess():
    assert one("DINO ViT-S/8").pretrain_epochs is None
    assert one("raw pixels").license is None
    assert one("raw pixels").params == 0


def test_the_network_in_a_checkpoint_follows_the_file_s_name():
    assert one("DINO ViT-B/8, full").model == "dino_vitbase8_pretrain_full_checkpoint.pth#teacher"
    assert one("iBOT ViT-L/16, 22K, full").model == "checkpoint.pth#student"
    assert one("DINO ResNet-50").model == "dino_resnet50_pretrain.pth"
    assert one("DINO ViT-B/8").model == "timm:vit_base_patch8_224.dino"


@each("model", [model for model in MODELS if model.published_name], ids=lambda model: model.name)
def test_every_published_name_stands_in_the_published_numbers(model):
    printed = {f"{row.method}; {row.arch}; {row.pretraining}" for row in read_published()}
    assert set(model.published_name.split(" | ")) <= printed
    assert published_scores(model)


def test_scores_are_those_of_the_papers():
    def first(name):
        return {benchmark: rows[0].value for benchmark, rows in published_scores(one(name)).items()}

    assert first("DINO ViT-S/16") == pytest.approx({
        "imagenet1k-knn": 0.745, "imagenet1k-linear": 0.770,
        "roxford5k-M": 0.418, "roxford5k-H": 0.137, "rparis6k-M": 0.631, "rparis6k-H": 0.344})
    assert first("DINO ViT-B/8")["copydays-strong"] == pytest.approx(0.855)
    assert first("iBOT ViT-B/16, random mask") == pytest.approx(
        {"imagenet1k-knn": 0.773, "imagenet1k-linear": 0.798})
    assert first("DINOv2 ViT-g/14")["imagenet1k-linear"] == pytest.approx(0.865)
    assert published_scores(one("DINOv2 ViT-g/14, registers")) == {}


def test_all_printed_numbers_are_kept_with_their_sources():
    rows = published_scores(one("DINO ViT-B/8"))["copydays-strong"]
    assert [row.value for row in rows] == pytest.approx([0.855, 0.858])
    assert "Table 4" in rows[0].source
    assert "README" in rows[1].source


def test_accuracy_of_a_supervised_classifier_is_no_k_nn_score():
    """DINO's Table 2 repeats DeiT-S's 79.8 in both columns."""
    assert {row.benchmark for row in read_published() if row.method == "Supervised (DeiT)" and row.arch == "ViT-S/16"
            } >= {"imagenet1k-knn", "imagenet1k-linear"}
    assert set(published_scores(one("DeiT-S/16"))) == {"roxford5k-M", "roxford5k-H", "rparis6k-M", "rparis6k-H"}


def test_each_benchmark_is_given_for_some_model_and_no_other():
    assert {benchmark for model in MODELS for benchmark in published_scores(model)} == set(BENCHMARKS)


@each(("pattern", "names"), [
    ("DINO ViT-b/8", ["DINO ViT-B/8", "DINO ViT-B/8, full"]),
    ("timm:vit_base_patch?_224.dino", ["DINO ViT-B/8"]),
    ("*_MAE", []),
    ("*.mae", ["MAE ViT-B/16", "MAE ViT-L/16", "MAE ViT-H/14"]),
    ("gldv2", ["DINO ViT-S/16, landmarks"]),
    ("sat-*", ["DINOv3 ViT-L/16, satellite"]),
    ("dino_deitsmall8_pretrain.pth", ["DINO ViT-S/8"]),
    ("pixels", ["raw pixels"]),
])
def test_a_pattern_is_part_of_or_a_glob_over_uri_file_name_method_and_data(pattern, names):
    if names:
        assert [model.name for model in known_models(pattern)] == names
    else:
        with pytest.raises(UsageError):
            known_models(pattern)


def test_no_pattern_gives_everything():
    assert known_models(None) == known_models("") == known_models("*") == MODELS


@each(("pattern", "near"), [
    ("dyno", "'dino'"), ("timm:vit_base_patch16_244.mae", "'timm:vit_base_patch16_224.mae'"),
    ("vit_smal_patch", "'vit_small_patch16_224'"), ("superviced", "'supervised'"),
])
def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest_names(pattern, near):
    with pytest.raises(UsageError) as raised:
        known_models(pattern)
    assert f"'{pattern}'" in str(raised.value)
    assert near in str(raised.value)
    assert f"all {len(MODELS)}" in str(raised.value)


def test_a_pattern_that_resembles_nothing_gets_no_suggestion():
    with pytest.raises(UsageError) as raised:
        known_models("qqqqqqq")
    assert "nearest" not in str(raised.value)


def table_of(text):
    return text.partition("\n\n")[0].splitlines()


def test_the_table_reads_by_columns():
    lines = table_of(as_text(known_models("*ViT-B/8*")))
    assert [line.split() for line in lines[:2]] == [
        ["MODEL", "Name", "Params", "Patch", "Image", "Pretrained", "on", "Epochs", "License", "k-NN", "Linear",
         "Copydays", "ROxford", "RParis"],
        ["timm:vit_base_patch8_224.dino", "DINO", "ViT-B/8", "85.8", "M", "8", "224", "ImageNet-1K", "-",
         "apache-2.0", "77.4", "80.1", "85.5", "40.1/13.7", "65.3/35.3"]]
    for header in ("Name", "Pretrained on", "License"):
        start = lines[0].index(header)
        assert all(line[start - 2:start] == "  " and line[start] != " " for line in lines)
    for header in ("Params", "Patch", "Image", "Epochs", "k-NN", "Linear", "Copydays", "ROxford", "RParis"):
        end = lines[0].index(header) + len(header)
        assert all(line[end - 1] != " " and line[end:end + 2].strip() == "" for line in lines)


def test_what_has_to_be_downloaded_is_numbered():
    text = as_text(known_models("ibot*22K*"))
    assert [line.split()[0] for line in table_of(text)[1:]] == ["[1]", "[2]", "[3]", "[4]"]
    assert "[4] download https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/vitl_16_pt22k/" \
           "checkpoint.pth,\n    then checkpoint.pth#student\n" in text
    assert "full: a training checkpoint" in text
    assert "full: a training checkpoint" not in as_text(known_models("*.mae"))


@each("width", [90, 100, 120, 160, 200])
def test_the_table_fits_the_terminal(width):
    lines = table_of(as_text(MODELS, width))
    assert len(lines) == len(MODELS) + 1
    assert max(map(len, lines)) <= width
    assert lines[0].split()[:2] == ["MODEL", "Name"]


def test_columns_without_room_are_named():
    wide, narrow = as_text(MODELS), as_text(MODELS, 120)
    assert table_of(narrow)[0].split() == ["MODEL", "Name", "Params", "k-NN", "Linear"]
    assert "Left out for want of width: Patch, Image, Pretrained on, Epochs, License, Copydays, ROxford, RParis; " in \
        " ".join(narrow.split())
    assert "Left out" not in wide


def test_a_very_narrow_terminal_still_gets_model_and_name():
    assert table_of(as_text(known_models("*.mae"), 10))[0].split() == ["MODEL", "Name"]


def test_json_holds_the_facts_and_every_score_as_a_fraction():
    records = json.loads(as_json(MODELS))
    assert len(records) == len(MODELS)
    record = next(record for record in records if record["name"] == "DINO ViT-B/8")
    assert record["model"] == record["uri"] == "timm:vit_base_patch8_224.dino"
    assert record["params"] == 85_807_872
    assert record["pretrain_epochs"] is None
    assert [score["value"] for score in record["published"]["copydays-strong"]] == [0.855, 0.858]
    assert "arXiv:2104.14294" in record["published"]["imagenet1k-knn"][0]["source"]
    assert "T=0.07" in record["published"]["imagenet1k-knn"][0]["protocol"]
    assert json.loads(as_json([])) == []


def test_the_catalog_answers_without_heavy_libraries():
    code = "import sys\nfrom patchssl.report.catalog import as_json, as_text, known_models\n" \
           "as_text(known_models(), 80), as_json(known_models())\n" \
           "print(sorted({'torch', 'timm', 'pandas', 'numpy', 'matplotlib', 'faiss'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(FILE.parent.parent)})
    assert done.stdout.strip() == "[]"
