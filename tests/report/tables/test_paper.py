import dataclasses
import random

import pandas as pd
import pytest

from patchssl.eval.records import Result
from patchssl.report.tables.paper import PAPER, paper_frames, read_unavailable, write_paper
from patchssl.report.tables.published import read_published
from patchssl.runtime.errors import DataError

BASE = Result(model="m", method="pwself", arch="vit_small", weights_sha256="a" * 64, pretrain_data="cifar10",
              pretrain_epochs=100.0, task="knn", dataset="cifar10", dataset_fingerprint="d" * 64, protocol="dino",
              protocol_version=1, protocol_settings={}, protocol_fingerprint="1" * 16, metrics={"top1@20": 0.5},
              detail={"num_train": 50_000, "num_test": 10_000}, versions={}, device="cpu", duration=1.0)


def record(**changes: object) -> Result:
    return dataclasses.replace(BASE, **changes)


def test_all_columns_and_rows_stand_there_without_any_record():
    frames, numbers = paper_frames([])
    assert {title: len(frame.columns) - 3 for title, frame in frames.items()} == {
        "Classification of frozen features": 6, "Copy detection on Copydays": 1,
        "Retrieval on revisited Oxford and Paris": 8}
    for frame in frames.values():
        assert frame.Method.tolist()[:3] == ["DINO", "PW-Self", "iBOT"]
        assert set(frame.iloc[:3, 3:].to_numpy().ravel()) == {"not run"}
        assert set(frame[frame.Method == "PW-Self (published)"].iloc[0, 3:]) == {"not available"}
        assert all(text.strip() for text in frame.to_numpy().ravel())
        assert frame.attrs["bold"] == []
    assert not numbers.best.any() and set(numbers.interval) == {""}


def test_a_measured_number_goes_into_its_column_and_the_rest_is_not_run():
    frames, numbers = paper_frames([record(), record(task="linear", dataset="CIFAR-10", metrics={"top1": 0.6})])
    table = frames["Classification of frozen features"]
    row = table[table.Method == "PW-Self"].iloc[0]
    assert row[["Architecture", "Pretraining"]].tolist() == ["vit_small", "cifar10, 100 epochs"]
    assert row.iloc[3:].tolist() == ["50.0 [49.0, 51.0]", "60.0 [59.0, 61.0]", *["not run"] * 4]
    assert numbers[numbers.source == "measured"].percent.tolist() == [50.0, 60.0]


def test_other_protocols_other_methods_and_other_sets_stay_out():
    frames, _ = paper_frames([record(protocol="native"), record(method="random"), record(dataset="textures")])
    table = frames["Classification of frozen features"]
    assert set(table.iloc[:3, 3:].to_numpy().ravel()) == {"not run"}


def test_other_images_of_one_name_get_a_column_each():
    lists = [record(dataset="imagenet100", detail={"num_train": count, "num_test": 5000},
                    dataset_fingerprint=digit * 64, weights_sha256=digit * 64)
             for digit, count in (("a", 126_689), ("b", 130_000))]
    frames, _ = paper_frames(lists)
    table = frames["Classification of frozen features"]
    assert sum(name.startswith("imagenet100, 20-NN top-1, % (dino) #") for name in table.columns) == 2
    assert any("2 different sets of images" in note for note in table.attrs["notes"])


def test_images_that_only_have_the_name_of_a_set_fill_no_column():
    """Fourteen images in a folder called roxford5k are no Oxford."""
    toy = record(task="roxford5k", dataset="roxford5k", metrics={"medium/map": 0.9, "hard/map": 0.8},
                 detail={"official": False, "num_queries": 4, "num_database": 14, "num_distractors": 0})
    frames, numbers = paper_frames([toy])
    table = frames["Retrieval on revisited Oxford and Paris"]
    assert set(table.iloc[:3, 3:].to_numpy().ravel()) == {"not run"}
    assert table[table.Method == "DINO (published)"].iloc[:, 3].str.contains("[", regex=False).any()
    assert any("roxford5k are left out" in note for note in table.attrs["notes"])
    assert "measured" not in set(numbers.source)
    sound = dataclasses.replace(toy, detail={**toy.detail, "official": True, "num_queries": 70, "num_database": 4993})
    frames, _ = paper_frames([sound])
    assert "90.0" in frames["Retrieval on revisited Oxford and Paris"].to_numpy().ravel()


def test_published_numbers_are_the_files_under_the_protocol_they_were_printed_for():
    frames, numbers = paper_frames([])
    printed = {round(100 * row.value, 4) for row in read_published()}
    assert set(numbers.percent) <= printed
    retrieval = frames["Retrieval on revisited Oxford and Paris"].set_index(["Method", "Architecture", "Pretraining"])
    dino = retrieval.loc[("DINO (published)", "ViT-S/16", "ImageNet-1K, 800 epochs")]
    assert dino[[name for name in retrieval if "(dino)" in name]].str.split().str[0].tolist() == [
        "41.8", "13.7", "63.1", "34.4"]  # Table 3 of the DINO paper
    assert set(dino[[name for name in retrieval if "(ibot)" in name]]) == {"other protocol"}
    ibot = retrieval.loc[("iBOT (published)", "ViT-S/16", "ImageNet-1K, 800 epochs")]
    assert ibot[[name for name in retrieval if "(ibot)" in name]].str.split().str[0].tolist() == [
        "36.6", "13.0", "61.5", "34.1"]  # Table 16 of the iBOT paper


def test_ablations_transfer_and_other_code_are_not_set_beside_the_protocol():
    frames, numbers = paper_frames([])
    table = frames["Classification of frozen features"].set_index(["Method", "Architecture", "Pretraining"])
    linear = "imagenet1k, linear top-1, % (dino) ‡"
    assert table.loc[("DINO (published)", "ViT-S/16", "ImageNet-1K, 800 epochs"), linear].split()[0] == "77.0"
    assert "," not in table.loc[("DINO (published)", "ViT-S/16", "ImageNet-1K, 800 epochs"), linear]
    assert numbers[numbers.dataset == "cifar10"].empty  # only transfer of models pretrained elsewhere is printed


def test_columns_that_mix_pretraining_are_marked_and_said():
    frames, _ = paper_frames([record(), record(method="dino", pretrain_epochs=200.0, weights_sha256="b" * 64)])
    table = frames["Classification of frozen features"]
    assert [name.endswith(" ‡") for name in table.columns[3:]] == [True, False, False, False, True, True]
    assert any(note.startswith("‡") for note in table.attrs["notes"])
    assert not any(name.endswith("(ibot) ‡") for name in frames["Retrieval on revisited Oxford and Paris"].columns)


def test_files_are_the_same_bytes_in_any_order(tmp_path):
    records = [record(weights_sha256=f"{seed:064x}", seed=seed, metrics={"top1@20": 0.5 + seed / 100})
               for seed in range(3)] + [record(method="dino", weights_sha256="e" * 64)]
    first = [path.read_bytes() for path in write_paper(records, tmp_path / "a")]
    random.Random(0).shuffle(records)
    paths = write_paper(records, tmp_path / "b")
    assert [path.read_bytes() for path in paths] == first
    assert [path.name for path in paths] == ["paper.md", "paper.csv", "paper.tex"]
    assert all(f"## {title}" in paths[0].read_text("utf-8") for title in PAPER)
    read = pd.read_csv(paths[1])
    assert (read.source == "measured").sum() == 2


def test_a_data_set_that_could_not_be_had_is_said_where_nothing_was_measured(tmp_path):
    assert read_unavailable(tmp_path) == {}
    (tmp_path / "unavailable.txt").write_text("# why\nCIFAR-10: no network\nimagenet1k\n\n")
    unavailable = read_unavailable(tmp_path)
    assert unavailable == {"cifar10": "no network", "imagenet1k": "no reason stated"}
    frames, _ = paper_frames([], unavailable)
    table = frames["Classification of frozen features"]
    assert table.iloc[0, 3:].tolist() == [*["data not available"] * 2, *["not run"] * 2, *["data not available"] * 2]
    assert ("data not available, as unavailable.txt says: cifar10: no network; imagenet1k: no reason stated."
            in table.attrs["notes"])
    assert table.attrs["notes"][0] == "not run: there is no such record among those read."
    assert "not run: there is no such record among those read." in frames["Copy detection on Copydays"].attrs["notes"]
    (tmp_path / "unavailable.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read"):
        read_unavailable(tmp_path)
