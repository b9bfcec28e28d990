import csv
from pathlib import Path

import pytest
from cases import each

import patchssl
from patchssl.report.tables.published import plain_name, published, read_published

FILE = Path(patchssl.__file__).parent / "report" / "tables" / "published.csv"


def test_every_row_of_the_file_is_read():
    with FILE.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert len(read_published()) == len(lines) - 1
    assert [row.value * 100 for row in read_published()] == pytest.approx(
        [float(line[8]) for line in lines[1:]]
    )


def test_dino_on_imagenet_is_the_paper_s_number_with_its_source():
    found = [
        row
        for row in published("knn", "ImageNet-1K", "top1@20")
        if (row.method, row.arch) == ("DINO", "ViT-S/16")
    ]
    by_epochs = {row.pretraining: row for row in reversed(found)}
    row = by_epochs["ImageNet-1K, 800 epochs"]
    assert row.value == pytest.approx(0.745)
    assert "Table 2" in row.source
    assert "2104.14294" in row.source


@each(
    ("task", "dataset", "metric"),
    [("knn", "textures", "top1@20"), ("knn", "imagenet1k", "top5@20"), ("patches", "imagenet1k", "exact")],
)
def test_nothing_is_made_up_where_nothing_is_printed(task, dataset, metric):
    assert published(task, dataset, metric) == []


def test_no_printed_number_of_pw_self_is_claimed():
    assert not [row for row in read_published() if "pw" in row.method.lower()]


@each("name", ["CIFAR-10", "cifar10", "Cifar_10"])
def test_names_of_data_sets_lose_case_and_punctuation(name):
    assert plain_name(name) == "cifar10"


def test_numbers_of_imagenette_are_others_and_under_no_protocol_of_ours():
    """Printed in benchmarks/imagenet10/RESULTS.md of stable-pretraining, in percent."""
    rows = [row for row in read_published() if row.benchmark.startswith("imagenette")]
    assert {(row.method.partition(" ")[0], row.benchmark): row.value for row in rows} == pytest.approx({
        ("DINO", "imagenette-knn"): 0.838, ("DINO", "imagenette-linear"): 0.861,
        ("iBOT", "imagenette-knn"): 0.433, ("iBOT", "imagenette-linear"): 0.579,
        ("VICRegL", "imagenette-knn"): 0.672, ("VICRegL", "imagenette-linear"): 0.727})
    assert {row.protocol_name for row in rows} == {None}
    assert {row.pretraining for row in rows} == {"Imagenette, 200 epochs"}
    assert published("knn", "imagenette", "top1@20") == []  # not beside ours: another protocol, another project
