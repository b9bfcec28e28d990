import dataclasses
import io
import random

import pandas as pd
import pytest
from cases import each

from patchssl.eval.linear.task import linear_protocol
from patchssl.eval.records import Result
from patchssl.models.load import load_backbone
from patchssl.report.tables.build import comparison_table, score_table, write_tables
from patchssl.report.tables.render import to_csv, to_markdown

BASE = Result(
    model="run-0",
    method="pwself",
    arch="vit_tiny",
    weights_sha256="a" * 64,
    pretrain_data="textures",
    pretrain_epochs=20.0,
    task="knn",
    dataset="textures",
    dataset_fingerprint="d" * 64,
    protocol="native",
    protocol_version=1,
    protocol_settings={"resize": 32},
    protocol_fingerprint="1" * 16,
    metrics={"top1@20": 0.3, "top5@20": 0.75},
    detail={"num_test": 1500},
    seed=0,
    versions={},
    device="cpu",
    duration=1.0,
)
TOP1 = "textures, 20-NN top-1, % (native)"


def record(**changes: object) -> Result:
    return dataclasses.replace(BASE, **changes)


def quickstart() -> list[Result]:
    """Three seeds of PW-Self and DINO, a random network and pixels."""
    records = []
    for seed, share in enumerate((0.2, 0.3, 0.4)):
        for method, gain in (("pwself", 0.01), ("dino", 0.0)):
            records.append(
                record(
                    method=method,
                    seed=seed,
                    weights_sha256=f"{method == 'dino':d}{seed:063x}",
                    metrics={"top1@20": share + gain, "top5@20": 0.7},
                )
            )
    for method, letter, share in (("random", "b", 0.125), ("pixels", "c", 0.159)):
        records.append(
            record(
                method=method,
                pretrain_data=None,
                pretrain_epochs=None,
                weights_sha256=letter * 64,
                metrics={"top1@20": share, "top5@20": 0.5},
            )
        )
    return records


def parse(markdown: str) -> list[list[str]]:
    """Cells of the pipe table, by splitting at pipes that are not escaped."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")] for line in lines]


def test_rows_cells_and_notes_of_the_quickstart_table():
    table = comparison_table(quickstart())
    assert list(table.columns) == [
        "Method",
        "Architecture",
        "Pretraining",
        TOP1,
        "textures, 20-NN top-5, % (native)",
    ]
    assert table["Method"].tolist() == ["Raw pixels", "Random network", "DINO", "PW-Self"]
    assert table["Pretraining"].tolist() == ["–", "untrained", "textures, 20 epochs", "textures, 20 epochs"]
    # half of the interval: 4.303 x 10.0 / sqrt(3) = 24.8 points
    assert table[TOP1].tolist()[2:] == ["30.0 ± 24.8 (n = 3)", "31.0 ± 24.8 (n = 3)"]
    assert table[TOP1].tolist()[0] == "15.9 [14.1, 17.8]"
    notes = " ".join(table.attrs["notes"])
    assert "t-interval" in notes
    assert "Wilson" in notes
    assert "published" not in notes


def test_a_single_record_without_a_count_has_no_interval_and_no_note():
    table = comparison_table([record(detail={})])
    assert table[TOP1].tolist() == ["30.0"]
    assert table.attrs["notes"] == []


def test_another_protocol_fingerprint_gets_its_own_marked_column_and_a_footnote():
    other = record(
        method="dino",
        weights_sha256="b" * 64,
        protocol_fingerprint="2" * 16,
        protocol_settings={"resize": 64},
    )
    table = comparison_table([BASE, other])
    first, second = f"{TOP1} #dddddd/111111", f"{TOP1} #dddddd/222222"
    assert table[first].tolist() == ["not run", "30.0 [27.7, 32.4]"]
    assert table[second].tolist() == ["30.0 [27.7, 32.4]", "not run"]
    assert any("2 settings" in note and "resize (32, 64)" in note for note in table.attrs["notes"])


def test_other_images_under_the_same_name_get_their_own_column_and_a_footnote():
    other = record(method="dino", dataset_fingerprint="e" * 64)
    table = comparison_table([BASE, other])
    assert sum(name.startswith(TOP1) for name in table.columns) == 2
    assert any("2 different sets of images" in note for note in table.attrs["notes"])
    assert not any("earlier version" in note for note in table.attrs["notes"])
    newer = dataclasses.replace(other, detail={**other.detail, "fingerprints_cover": {"version": 2}})
    said = [note for note in comparison_table([BASE, newer]).attrs["notes"] if "earlier version" in note]
    assert len(said) == 1 and said[0].startswith("of these, #dddddd is known")


@pytest.mark.parametrize("seed", [0, None])
def test_networks_that_share_a_seed_or_state_none_have_a_row_each_and_a_footnote(seed):
    """Two unrelated checkpoint.pth of DINO are no two seeds of one thing."""
    both = [record(model="checkpoint", method="dino", seed=seed, weights_sha256=digit * 64) for digit in "bc"]
    table = comparison_table(both)
    assert table.Method.tolist()[:2] == ["DINO, checkpoint bbbbbbbb", "DINO, checkpoint cccccccc"]
    assert table[TOP1].tolist()[:2] == ["30.0 [27.7, 32.4]"] * 2
    assert any("not averaged" in note for note in table.attrs["notes"])
    assert set(score_table(both).n) == {1}
    apart = comparison_table([dataclasses.replace(both[0], model="one"), dataclasses.replace(both[1], seed=7)])
    assert apart.Method.tolist()[:2] == (["DINO", "DINO, one"] if seed is None else ["DINO"])[:len(apart)]


def test_few_shots_have_columns_by_their_number_and_say_what_the_spread_is(tmp_path):
    metrics = {"top1@20": 0.3, "fewshot10/top1@20": 0.25, "fewshot2/top1@20": 0.2}
    few = {"fewshot2/top1@20": {"deviation": 0.0123, "draws": 5}, "fewshot10/top1@20": {"deviation": 0.01, "draws": 5}}
    records = [record(protocol="native-fewshot", protocol_fingerprint="3" * 16, metrics=metrics,
                      detail={"fewshot": few}), record()]
    table = comparison_table(records)
    columns = [f"textures, 20-NN {shots}-shot top-1, % (native-fewshot)" for shots in (2, 10)]
    assert [name for name in table.columns if "shot top" in name] == columns
    assert table[columns].to_numpy().tolist() == [["20.0 ± 1.2 (5 draws)", "25.0 ± 1.0 (5 draws)"]]
    assert any("standard deviation over draws" in note for note in table.attrs["notes"])
    numbers = score_table(records).set_index("metric")[["percent", "low", "high", "interval"]]
    assert numbers.loc["fewshot2/top1@20"].tolist() == [20.0, 18.77, 21.23, "draws"]
    written = [[path.read_bytes() for path in write_tables(order, tmp_path / name)]
               for name, order in (("one", records), ("two", records[::-1]))]
    assert written[0] == written[1]


def test_a_choice_made_by_the_test_images_is_labelled():
    def linear(name: str, selection: str) -> Result:
        return record(task="linear", metrics={"top1": 0.5}, protocol=name, protocol_fingerprint=name.encode().hex() * 2,
                      protocol_settings={"selection": selection})

    records = [linear("dino", "best test epoch"), linear("cached", "accuracy on held-out training images")]
    labelled = [note for note in comparison_table(records, "linear").attrs["notes"] if "test epoch" in note]
    assert [note.partition(":")[0] for note in labelled] == ["dino"]
    assert not any("test epoch" in note for note in comparison_table(records[1:], "linear").attrs["notes"])
    settings = linear_protocol("dino", load_backbone("random:resnet10t")).settings
    assert settings["selection"] in labelled[0]


def imagenet(protocol: str = "dino", detail: dict[str, int] | None = None) -> Result:
    return record(
        method="dino",
        model="timm:vit_small_patch16_224.dino",
        dataset="imagenet1k",
        protocol=protocol,
        pretrain_data="ImageNet-1K",
        pretrain_epochs=800.0,
        metrics={"top1@20": 0.7447},
        seed=None,
        detail=detail or {"num_train": 1_281_167, "num_test": 50_000},
    )


def test_published_rows_stand_apart_with_their_sources():
    table = comparison_table([imagenet(), BASE])
    column = "imagenet1k, 20-NN top-1, % (dino) ‡"  # epochs differ among the published rows
    row = table[
        (table.Method == "DINO (published)")
        & (table.Architecture == "ViT-S/16")
        & (table.Pretraining == "ImageNet-1K, 800 epochs")
    ]
    (cell,) = row[column]
    value, mark = cell.split()
    assert value == "74.5"
    (source,) = [note for note in table.attrs["notes"] if note.startswith(mark)]
    assert "2104.14294" in source
    assert row[TOP1].tolist() == ["not published"]
    assert table[column][table.Method == "PW-Self (published)"].tolist() == ["not available"]


@each("detail", [{"num_test": 14}, {"num_train": 1_281_167}, {"num_train": 1_281_167, "num_test": 49_997}])
def test_nothing_published_stands_beside_images_that_only_have_the_name(detail):
    table = comparison_table([imagenet(detail=detail)])
    assert not any("published" in method for method in table.Method)
    assert any(note.startswith("imagenet1k: these are not as many images") for note in table.attrs["notes"])
    assert set(score_table([imagenet(detail=detail)]).source) == {"measured"}
    both = comparison_table([imagenet(detail=detail), dataclasses.replace(imagenet(), dataset_fingerprint="e" * 64)])
    published = both[both.Method == "DINO (published)"].iloc[:, 3:]
    assert {"other images"} in [set(published[name]) for name in published.columns]


def test_published_numbers_are_not_set_beside_another_protocol():
    table = comparison_table([imagenet("native")])
    cells = table["imagenet1k, 20-NN top-1, % (native)"][table.Method == "DINO (published)"]
    assert set(cells) == {"other protocol"}


def test_numbers_behind_the_table():
    numbers = score_table(quickstart())
    row = numbers[(numbers.method == "DINO") & (numbers.metric == "top1@20")].iloc[0]
    assert (row.percent, row.n, row.interval) == (30.0, 3, "seeds")
    assert row.high - row.percent == pytest.approx(24.84, abs=0.01)
    assert row.protocol_fingerprint == "1" * 16


def test_markdown_says_what_the_frame_says():
    table = comparison_table(quickstart())
    header, rule, *rows = parse(to_markdown(table))
    assert header == list(table.columns)
    assert [cell[-1] for cell in rule] == ["-", "-", "-", ":", ":"]
    assert rows == table.to_numpy().tolist()
    assert all(f"- {note}" in to_markdown(table).splitlines() for note in table.attrs["notes"])


def test_a_hostile_name_stays_in_its_cell():
    table = comparison_table([record(method="other", model="a|b\n<script>x</script> `c`", arch="x\ny")])
    markdown = to_markdown(table)
    _, _, row = parse(markdown)
    assert len(row) == len(table.columns)
    assert "<script" not in markdown
    assert row[0] == "a\0b &lt;script>x&lt;/script> \\`c\\`"


def test_nothing_gives_an_empty_table():
    table = comparison_table([])
    assert (len(table), table.attrs["notes"]) == (0, [])
    assert to_markdown(table).count("\n") == 2


def test_same_records_same_bytes_in_any_order(tmp_path):
    records = [*quickstart(), imagenet(), record(task="linear", metrics={"top1": 0.6}, protocol="cached")]
    first = [path.read_bytes() for path in write_tables(records, tmp_path / "a")]
    random.Random(1).shuffle(records)
    assert [path.read_bytes() for path in write_tables(records, tmp_path / "b")] == first
    assert b"\r" not in b"".join(first)


def test_files_hold_every_task(tmp_path):
    records = [*quickstart(), record(task="linear", metrics={"top1": 0.6}, protocol="cached")]
    markdown, numbers, _ = write_tables(records, tmp_path / "new" / "folder", "scores")
    assert (markdown.name, numbers.name) == ("scores.md", "scores.csv")
    text = markdown.read_text(encoding="utf-8")
    assert text.index("## k-NN") < text.index("## Linear probe")
    assert to_markdown(comparison_table(records)) in text
    read = pd.read_csv(numbers)
    assert read.groupby("task").size().to_dict() == {"knn": 8, "linear": 1}


def test_csv_reads_back_as_the_same_numbers():
    numbers = score_table(quickstart())
    read = pd.read_csv(io.StringIO(to_csv(numbers)))
    assert read.percent.tolist() == numbers.percent.tolist()
    assert read.columns.tolist() == numbers.columns.tolist()


def patches(letter: str, exact: list[float], **changes: object) -> Result:
    """A record of patch correspondence: 200 images, half of them with each share."""
    shares = {"exact": exact * 100, "within1": [0.5, 0.7] * 100}
    references = {"chance": (0.0625, 0.4), "position": (0.07, 0.55), "pixels": (0.1, 0.42)}
    metrics = {f"{source}/{name}": value for source, values in references.items()
               for name, value in zip(("exact", "within1"), values, strict=True)}
    return record(task="patches", weights_sha256=letter * 64, detail={"num_images": 200, "shares": shares},
                  metrics={"exact": sum(exact) / 2, "within1": 0.6, **metrics}, **changes)


def test_patches_stand_beside_chance_position_and_pixels_of_the_same_views():
    table = comparison_table([patches("a", [0.5, 0.7]), patches("b", [0.1, 0.3], method="random")], "patches")
    assert table.iloc[:, [0, 3, 4]].to_numpy().tolist() == [
        ["Chance", "6.2", "40.0"], ["Position only", "7.0", "55.0"], ["Raw pixels", "10.0", "42.0"],
        ["Random network", "20.0 [18.6, 21.4]", "60.0 [58.6, 61.4]"],
        ["PW-Self", "60.0 [58.6, 61.4]", "60.0 [58.6, 61.4]"]]
    assert table.attrs["bold"] == [(4, 3)]  # within one patch both networks say the same
    assert any("Position only: the patch at the same place" in note for note in table.attrs["notes"])
    measured = patches("c", [0.1, 0.1], method="pixels")
    table = comparison_table([patches("a", [0.5, 0.7]), measured], "patches")
    assert table.Method.tolist() == ["Chance", "Position only", "Raw pixels", "PW-Self"]
    assert table.iloc[2, 3] == "10.0 [10.0, 10.0]"


def test_nothing_is_bold_that_is_not_better_than_position_only():
    table = comparison_table([patches("a", [0.0, 0.12])], "patches")
    assert table.attrs["bold"] == [(3, 4)]  # 60 within one patch, but 6 exact
