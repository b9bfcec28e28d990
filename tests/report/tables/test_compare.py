import dataclasses
import json

import numpy as np
import pytest
from cases import each
from typer.testing import CliRunner

from patchssl.cli import build_app
from patchssl.eval.records import Result, pack_bits
from patchssl.report.tables.compare import compare, find_records
from patchssl.report.tables.stats import paired_difference
from patchssl.runtime.errors import DataError, UsageError

BASE = Result(model="one", method="other", arch="vit", weights_sha256="a" * 64, task="knn", dataset="set",
              dataset_fingerprint="d" * 64, protocol="native", protocol_version=1, protocol_settings={"resize": 32},
              protocol_fingerprint="1" * 16, metrics={"top1@20": 0.5}, versions={}, device="cpu", duration=1.0)
FIRST, SECOND = np.tile([1, 1, 0, 0], 50).astype(bool), np.tile([1, 0, 1, 1], 50).astype(bool)


def knn(correct: np.ndarray, name: str = "one", **changes: object) -> Result:
    detail = {"num_test": len(correct), "correct": {"top1@20": pack_bits(correct)},
              "class_accuracy": {"cat": float(correct[:100].mean()), "dog": float(correct[100:].mean())}}
    base = {"model": name, "weights_sha256": name.encode().hex().ljust(64, "0"), "detail": detail,
            "metrics": {"top1@20": float(correct.mean()), "top5@20": 0.9}}
    return dataclasses.replace(BASE, **{**base, **changes})


def retrieval(aps: list, name: str = "one", **changes: object) -> Result:
    values = [ap for ap in aps if ap is not None]
    base = {"task": "roxford5k", "metrics": {"medium/map": sum(values) / len(values)},
            "detail": {"aps": {"medium": aps}, "queries": ["tower", "bridge", "hall"]}}
    return knn(FIRST, name, **{**base, **changes})


def test_difference_interval_and_p_are_of_the_pairs_and_second_minus_first():
    found = compare([knn(FIRST)], [knn(SECOND, "two")], seed=3)
    row = found.rows[0]
    assert (row.metric, row.first, row.second, row.difference) == ("top1@20", 0.5, 0.75, 0.25)
    pairs = paired_difference(FIRST.astype(float), SECOND.astype(float), seed=3)
    assert (row.low, row.high, row.p, row.num) == (pairs.low, pairs.high, pairs.p, 200)


def test_the_class_that_moved_most_comes_first():
    second = FIRST.copy()
    second[:20] = True  # ten cats more
    second[100:104] = True  # two dogs more
    (row, _) = compare([knn(FIRST)], [knn(second, "two")]).rows
    assert (row.moved_by, [moved.name for moved in row.moved]) == ("class", ["cat", "dog"])
    assert [moved.gap for moved in row.moved] == pytest.approx([0.1, 0.02])
    (row, _) = compare([knn(FIRST)], [knn(second, "two")], num_moved=1).rows
    assert [moved.name for moved in row.moved] == ["cat"]


def test_queries_are_named_and_those_without_a_value_left_out():
    found = compare([retrieval([0.5, None, 0.4])], [retrieval([0.6, None, 0.1], "two")])
    (row,) = found.rows
    assert (row.num, row.moved_by) == (2, "query")
    assert [(moved.name, round(moved.gap, 6)) for moved in row.moved] == [("hall", -0.3), ("tower", 0.1)]
    assert row.difference == pytest.approx(-0.1)


def test_queries_without_names_get_their_number_and_blocks_come_by_their_number():
    detail = {"aps": {name: [0.5, 1.0] for name in ("strong", "jpegqual/10", "jpegqual/3")}}
    metrics = {f"{name}/map": 0.75 for name in detail["aps"]}
    one = knn(FIRST, task="copydays", metrics=metrics, detail=detail)
    other = dataclasses.replace(one, weights_sha256="b" * 64, metrics=metrics | {"strong/map": 0.5},
                                detail={"aps": detail["aps"] | {"strong": [0.5, 0.5]}})
    rows = compare([one], [other]).rows
    assert [row.metric for row in rows] == ["strong/map", "jpegqual/3/map", "jpegqual/10/map"]
    assert [moved.name for moved in rows[0].moved] == ["strong #2"]


def test_a_metric_without_detail_has_a_difference_and_says_why_there_is_no_interval():
    row = compare([knn(FIRST)], [knn(SECOND, "two")]).rows[1]
    assert (row.metric, row.p, row.low, row.num) == ("top5@20", None, None, None)
    assert "no detail per query or test image in A and B" in row.why


@each(("changes", "reason"), [
    ({"dataset_fingerprint": "e" * 64}, "images are not the same .fingerprints dddddddd and eeeeeeee"),
    ({"dataset_fingerprint": "e" * 64, "detail": {"fingerprints_cover": {"version": 2, "test": "all 3 files"}}},
     "are not the same .*; the record of one .* knew images by names and sizes alone: score it again"),
    ({"protocol_fingerprint": "2" * 16, "protocol_settings": {"resize": 64}}, r"differ in resize \(32, 64\)"),
    ({"protocol": "dino"}, r"knn on set \(native\): only A has a record"),
    ({"dataset": "else"}, r"knn on else \(native\): only B has a record"),
    ({"detail": {}}, "top1@20: no interval: no detail per query or test image in B"),
])
def test_what_cannot_be_compared_is_refused_with_the_reason(changes, reason):
    with pytest.raises(DataError, match=f"cannot be compared: .*{reason}"):
        compare([knn(FIRST)], [knn(SECOND, "two", **changes)])


def test_what_can_be_compared_is_and_the_rest_is_said():
    first = [knn(FIRST), retrieval([0.5, 0.2, 0.4])]
    second = [knn(SECOND, "two"), retrieval([0.5, 0.3, 0.4], "two", dataset_fingerprint="e" * 64)]
    found = compare(first, second)
    assert {row.task for row in found.rows} == {"knn"}
    assert len(found.left_out) == 1 and "roxford5k on set (native): the images are not the same" in found.left_out[0]
    assert "skipped: roxford5k" in found.as_text()


def test_two_records_of_one_cell_are_not_chosen_between():
    with pytest.raises(UsageError, match="two records of knn on set"):
        compare([knn(FIRST), knn(SECOND)], [knn(SECOND, "two")])
    assert len(compare([knn(FIRST), knn(FIRST)], [knn(SECOND, "two")]).rows) == 2


def test_records_are_found_by_model_folder_and_path(tmp_path):
    path = knn(FIRST).write(tmp_path)
    knn(SECOND, "two").write(tmp_path)
    for name in ("one", path.parent.name, str(path), str(path.parent)):
        assert [record.model for record in find_records(name, tmp_path).records] == ["one"]
    with pytest.raises(UsageError, match="did you mean 'one'"):
        find_records("onne", tmp_path)
    with pytest.raises(UsageError, match="means 2 networks"):
        find_records(str(tmp_path), tmp_path / "empty")
    with pytest.raises(UsageError, match="holds no records"):
        find_records("one", tmp_path / "empty")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match=r"1 files below .*bad.json is damaged"):
        find_records("three", tmp_path)
    with pytest.raises(DataError, match="damaged"):
        find_records(str(tmp_path / "bad.json"), tmp_path)


def test_one_name_for_two_networks_is_refused_with_their_folders(tmp_path):
    folders = [knn(FIRST, weights_sha256=digit * 64).write(tmp_path).parent.name for digit in "ab"]
    with pytest.raises(UsageError, match=f"means 2 networks.*{folders[0]}, {folders[1]}"):
        find_records("one", tmp_path)
    assert find_records(folders[1], tmp_path).records[0].weights_sha256 == "b" * 64


def test_networks_of_equal_weights_are_named_by_the_folders_they_lie_in(tmp_path):
    """As ?heads=6 makes another network of a file."""
    def of(sha):
        record = knn(FIRST)
        record.detail["network"] = {"sha256": sha * 64}
        return record.write(tmp_path)

    paths = [of("e"), of("f")]
    folders = [path.parent.name for path in paths]
    assert folders[1] == f"{folders[0]}-ffffffff"
    with pytest.raises(UsageError, match=f"means 2 networks.*{folders[0]}, {folders[1]}"):
        find_records("one", tmp_path)
    for folder, sha in zip(folders, "ef", strict=True):
        [found] = find_records(folder, tmp_path).records
        assert found.network.sha256 == sha * 64


def test_the_command_prints_percent_json_and_no_control_characters(tmp_path):
    knn(FIRST).write(tmp_path)
    second = knn(SECOND, "two")
    second.detail["class_accuracy"] = {"cat\x1b[31m": 0.9, "dog": 1.0}
    first = knn(FIRST)
    first.detail["class_accuracy"] = {"cat\x1b[31m": 0.5, "dog": 0.5}
    paths = [str(record.write(tmp_path)) for record in (first, second)]
    result = CliRunner().invoke(build_app(), ["compare", *paths])
    assert result.exit_code == 0
    assert "B - A  +25.0  [+" in result.stdout and "dog +50.0, cat?[31m +40.0" in result.stdout
    result = CliRunner().invoke(build_app(), ["compare", "one", "two", "--results", str(tmp_path), "--json", "--seed",
                                              "7"])
    facts = json.loads(result.stdout)
    assert (facts["first"].split()[0], facts["seed"]) == ("one", 7)
    assert facts["rows"][0]["difference"] == 0.25
    assert facts["rows"][0]["moved"][0]["difference"] == pytest.approx(0.5)


def test_copies_are_named_by_block_and_original():
    """Copydays' strong copies have names of their own, in all other blocks they are called like the originals."""
    detail = {"aps": {"strong": [0.5, 1.0], "crops/10": [0.5, 1.0]},
              "queries": {"original": ["200000", "200100"], "strong": ["200001", "200101"]}}
    one = knn(FIRST, task="copydays", metrics={"strong/map": 0.75, "crops/10/map": 0.75}, detail=detail)
    other = dataclasses.replace(one, model="two", metrics={"strong/map": 0.5, "crops/10/map": 0.5},
                                detail=detail | {"aps": {"strong": [0.5, 0.5], "crops/10": [0.5, 0.5]}})
    moved = {row.metric: [name for name, _, _ in row.moved] for row in compare([one], [other]).rows}
    assert moved == {"strong/map": ["strong/200101"], "crops/10/map": ["crops/10/200100"]}
