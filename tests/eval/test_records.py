import json
import math
import os
import sys

import numpy as np
import pytest
from cases import each
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from patchssl.eval.records import (
    Result,
    library_versions,
    pack_bits,
    plain_text,
    read_result,
    read_results,
    safe_name,
    unpack_bits,
)
from patchssl.runtime.errors import DataError

FACTS = {
    "model": "my-run",
    "method": "pwself",
    "arch": "vit_tiny_patch16_224",
    "weights_sha256": "0123456789abcdef" * 4,
    "pretrain_data": "textures",
    "pretrain_epochs": 20,
    "task": "knn",
    "dataset": "textures",
    "dataset_fingerprint": "ab" * 32,
    "protocol": "native",
    "protocol_version": 1,
    "protocol_settings": {"resize": 32, "ks": [10, 20], "temperature": 0.07},
    "protocol_fingerprint": "12" * 8,
    "metrics": {"top1@20": 0.1 + 0.2, "top5@20": 1.0},
    "detail": {"num_test": 3, "class_accuracy": {"café": 0.5}},
    "seed": 0,
    "versions": {"torch": "2.14", "faiss": None},
    "device": "cpu, 2 threads",
    "duration": 1.25,
}


def make(**changes):
    return Result(**{**FACTS, **changes})


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_record_comes_back_as_it_was_written(tmp_path):
    path = make().write(tmp_path)
    assert path == tmp_path / "my-run-01234567" / "knn-textures@native.json"
    assert read_results(tmp_path) == ([make()], [])
    assert read_result(path).metrics["top1@20"] == 0.1 + 0.2  # to the last bit


def laid_out(value, depth=0):
    """JSON, sorted and indented by two, with lists that hold numbers alone on one line."""
    inner, outer = "\n" + "  " * (depth + 1), "\n" + "  " * depth
    if isinstance(value, dict) and value:
        return "{" + ",".join(f"{inner}{json.dumps(key, ensure_ascii=False)}: {laid_out(value[key], depth + 1)}"
                              for key in sorted(value)) + outer + "}"
    if isinstance(value, list) and any(isinstance(item, str | list | dict) for item in value):
        return "[" + ",".join(inner + laid_out(item, depth + 1) for item in value) + outer + "]"
    return json.dumps(value, ensure_ascii=False)


def test_the_file_is_sorted_indented_and_ends_with_a_newline(tmp_path):
    text = make().write(tmp_path).read_text(encoding="utf-8")
    content = json.loads(text)
    assert text == laid_out(content) + "\n"
    assert (content["format"], content["schema"]) == ("patchssl result", 1)
    assert {name: content[name] for name in FACTS} == FACTS


def test_a_list_of_numbers_stands_on_one_line_and_strings_are_left_alone(tmp_path):
    detail = {"shares": [0.25, 1, -3e-7], "empty": [], "names": ["[ 1 ]", "a, b"], "deep": [[1, 2], [3]],
              "mixed": [1, "[\n 2\n]"]}
    path = make(detail=detail).write(tmp_path)
    text = path.read_text("utf-8")
    assert read_result(path).detail == detail
    assert text == laid_out(json.loads(text)) + "\n"
    assert '"shares": [0.25, 1, -3e-07]' in text and '"[ 1 ]",' in text


def test_of_a_studys_folder_its_records_are_read_and_nothing_else(tmp_path):
    make().write(tmp_path / "study" / "records" / "pwself")
    for name in ("study.json", "cells/pwself-0.json", "runs/pwself-0/run.json"):
        (tmp_path / "study" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "study" / name).write_text("{}")
    assert read_results(tmp_path) == ([make()], [])
    (tmp_path / "study" / "cells").rename(tmp_path / "study" / "others")
    assert len(read_results(tmp_path)[1]) == 3


def test_another_run_of_the_same_cell_replaces_the_first_and_leaves_nothing_else(tmp_path):
    make(duration=1.0).write(tmp_path)
    make(duration=2.0).write(tmp_path)
    assert [r.duration for r in read_results(tmp_path)[0]] == [2.0]
    assert len(list(tmp_path.rglob("*.*"))) == 1


def known(sha="e", **changes):
    """A record that knows its network, as all do now."""
    about = {"network": {"sha256": sha * 64, **changes.pop("network", {})}}
    return make(**{**changes, "detail": {**FACTS["detail"], **changes.get("detail", {}), **about}})


@each("other", [
    known(dataset_fingerprint="cd" * 32),  # two sets called textures
    known(protocol_fingerprint="34" * 8),  # other settings under one name
    known(sha="f"),  # the same weights with other heads
    known(sha="f", network={"own_code": True}),
])
def test_what_only_shares_its_names_is_written_beside(other, tmp_path):
    first = known(duration=1.0)
    paths = [first.write(tmp_path), other.write(tmp_path)]
    assert len({*paths}) == 2
    again = [known(duration=2.0).write(tmp_path), other.write(tmp_path)]
    assert again == paths  # whichever comes first
    assert sorted(record.duration for record in read_results(tmp_path)[0]) == [1.25, 2.0]
    paths[0].unlink()
    assert other.write(tmp_path) == paths[1]


def test_the_weights_name_a_loaders_network_and_all_of_it_ones_own(tmp_path):
    assert known().write(tmp_path).parent.name == "my-run-01234567"
    assert known(network={"own_code": True}).write(tmp_path).parent.name == "my-run-eeeeeeee"


def test_a_record_from_before_images_were_known_by_content_is_kept(tmp_path):
    """Names and sizes may be those of other images: nobody can tell any more."""
    old = make().write(tmp_path)
    new = known(dataset_fingerprint="cd" * 32).write(tmp_path)
    assert new != old
    assert known(dataset_fingerprint="cd" * 32, duration=9.0).write(tmp_path) == new
    assert len(read_results(tmp_path)[0]) == 2


@each("said", [None, 3, {}, {"sha256": 5}, {"sha256": "e" * 63}, {"sha256": "../" * 20}])
def test_what_a_record_says_of_its_network_is_read_with_distrust(said):
    network = make(detail={"network": said}).network
    assert (network.sha256, network.own_code, network.key) == (None, False, FACTS["weights_sha256"])


def test_a_write_that_fails_keeps_the_old_record_and_leaves_no_partial_file(tmp_path, monkeypatch):
    path = make(duration=1.0).write(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DataError, match=r"could not be written to .*knn-textures@native\.json: No space left"):
        make(duration=2.0).write(tmp_path)
    assert read_result(path).duration == 1.0
    assert list(path.parent.iterdir()) == [path]


def full_disk(_):
    raise OSError(28, "No space left on device")


def test_what_json_cannot_hold_never_reaches_the_disk(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        make(detail={"x": math.nan}).write(tmp_path)
    with pytest.raises(TypeError):
        make(detail={"x": np.zeros(3)}).write(tmp_path)
    assert not list(tmp_path.rglob("*"))


@each("value", [1.0000001, -0.1, math.nan, math.inf, 43.2, "0.5", None, True])
def test_a_metric_that_is_no_fraction_is_refused_by_name(value):
    with pytest.raises(ValueError, match="top1@20"):
        make(metrics={"top5@20": 0.5, "top1@20": value})


@each(
    ("field", "value"),
    [
        ("model", ""),
        ("weights_sha256", "../../x"),
        ("seed", 1.5),
        ("duration", math.inf),
        ("metrics", {}),
        ("protocol_settings", [1]),
        ("pretrain_epochs", -1),
        ("versions", {"torch": 2}),
    ],
)
def test_other_wrong_fields_are_refused_by_name(field, value):
    with pytest.raises(ValidationError) as caught:
        make(**{field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_a_field_nobody_knows_is_refused():
    with pytest.raises(ValidationError, match="protcol"):
        make(protcol="native")


@each(
    "name",
    ["../../etc/passwd", "..", "a/b\\c", "/abs", ".hidden", "x\0y", "...", "", "timm:vit.dino", "図 1"],
)
def test_hostile_names_stay_inside_the_folder(tmp_path, name):
    root = tmp_path / "root"
    path = make(model=name or "x", dataset=name or "x").write(root)
    assert path.resolve().parent.parent == root.resolve()
    assert not path.name.startswith(".")
    assert ".." not in f"{path.parent.name}/{path.name}"
    assert read_results(root)[0][0].model == (name or "x")


@given(st.text(max_size=300))
def test_any_name_becomes_one_short_component_of_a_path(name):
    safe = safe_name(name)
    assert 1 <= len(safe) <= 60
    assert not set(safe) & set('/\\\0:@"<>|?* \n')
    assert ".." not in safe
    assert safe[0] != "."
    assert safe_name(safe) == safe


def test_long_names_that_differ_at_the_end_stay_different(tmp_path):
    paths = {make(dataset="x" * 200 + end).write(tmp_path) for end in "ab"}
    assert len(paths) == 2


def test_damaged_old_and_hostile_files_are_named_and_skipped(tmp_path):
    good = make().write(tmp_path)

    def spoiled(name, text):
        path = tmp_path / "bad" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    whole = good.read_text()
    spoiled("01-cut.json", whole[: len(whole) // 2])
    spoiled("02-empty.json", "")
    spoiled("03-bytes.json", b"\xff\xfe\x00")
    spoiled("04-deep.json", "[" * 100_000)
    spoiled("05-list.json", "[1, 2]")
    spoiled("06-other.json", '{"images": 3}')
    rewrite(spoiled("07-newer.json", whole), schema=99)
    rewrite(spoiled("08-none.json", whole), schema=None)
    rewrite(spoiled("09-percent.json", whole), metrics={"top1@20": 43.2})
    spoiled("10-nan.json", whole.replace("1.0", "NaN"))
    rewrite(spoiled("11-extra.json", whole), surprise=1)
    rewrite(spoiled("12-name.json", whole), model=["x"])
    spoiled("13-digits.json", whole.replace("1.25", "1" * 10_000))
    rewrite(spoiled("13-self.json", whole), __dataclass_self__=1)
    os.mkfifo(tmp_path / "bad" / "14-pipe.json")
    (tmp_path / "bad" / "15-folder.json").mkdir()
    (tmp_path / "bad" / "16-link.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "bad" / "notes.txt").write_text("not looked at")
    results, problems = read_results(tmp_path)
    assert results == [make()]
    expected = [
        "damaged or not JSON",
        "damaged or not JSON",
        "damaged or not JSON",
        "damaged or not JSON",
        "JSON but not a result record",
        "JSON but not a result record",
        "schema 99, this patchssl reads schema 1",
        "schema None",
        "metrics.top1@20: Input should be less than or equal to 1",
        "metrics.top5@20",
        "surprise",
        "model",
        "damaged or not JSON",
        "not a valid result record",
        "not a regular file",
        "not a regular file",
    ]
    assert len(problems) == len(expected)
    files = sorted(path for path in (tmp_path / "bad").glob("*.json") if path.name != "15-folder.json")
    for path, problem, words in zip(files, problems, expected, strict=True):
        assert problem.startswith(f"{path} ")
        assert words in problem


def test_an_enormous_file_is_not_read(tmp_path):
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(65 * 2**20)
    assert read_results(tmp_path)[1] == [f"{tmp_path / 'big.json'} is larger than 64 MiB: not a result record"]


def test_results_come_in_the_order_of_their_paths_and_links_to_folders_are_not_followed(tmp_path):
    for model in ("b", "a", "c"):
        make(model=model).write(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [result.model for result in read_results(tmp_path)[0]] == ["a", "b", "c"]
    assert read_results(tmp_path / "missing") == ([], [])


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_come_back_from_their_hex_digits(bits):
    text = pack_bits(np.array(bits))
    padded = "".join("1" if bit else "0" for bit in bits).ljust(-(-len(bits) // 8) * 8, "0")
    assert int(text, 16) == int(padded, 2)
    assert len(text) == len(padded) // 4
    assert unpack_bits(text, len(bits)).tolist() == bits


def test_bits_of_another_count_are_refused():
    with pytest.raises(ValueError, match="2 hex digits do not hold 9 bits"):
        unpack_bits("ff", 9)


def test_bytes_of_names_that_are_no_text_can_be_recorded(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    path = make(dataset=plain_text(name)).write(tmp_path)
    assert read_result(path).dataset == "caf\\udce9"


def test_versions_say_what_is_installed():
    versions = library_versions()
    assert versions["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert versions["numpy"] == np.__version__
    assert {"patchssl", "torch", "torchvision", "timm"} <= set(versions)
