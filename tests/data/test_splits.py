from pathlib import Path

import pytest
from cases import each

from patchssl.data.splits import choose_splits, expand_braces, require_files, split_files
from patchssl.runtime.errors import DataError, UsageError


@each(("pattern", "names"), [
    ("a.tar", ["a.tar"]),
    ("s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
    ("s-{9..11}.tar", ["s-9.tar", "s-10.tar", "s-11.tar"]),
    ("{val,train}/{1..2}", ["val/1", "val/2", "train/1", "train/2"]),
])
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


def test_braces_agree_with_the_library_that_webdataset_uses():
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    for pattern in ("x-{0000..0012}.tar", "{train,val}-{08..11}.tar", "p/{a,b,}/{1..1}",
                    "{train-{008..011},val-{0..1},x{,y}}.tar", "{{a,b},c}{d,e}"):
        assert expand_braces(pattern) == list(braceexpand(pattern))


@each("pattern", ["{}", "{a}", "{3..1}", "{0..999999999999}", "{1..1000}{1..1000}", "{a,b",
                  "{a,{b,c}", "a}b{1..2}", "{" * 5000, "{a,b}" * 21])
def test_braces_that_are_refused(pattern):
    with pytest.raises(UsageError, match=r"range|neither|more than (100,000|20)|and not (opened|closed)"):
        expand_braces(pattern)


@each(("names", "found"), [
    (["x-train-000.tar", "x-train-001.tar", "x-validation-00.tar"], {"train": [0, 1], "val": [2]}),
    (["train2017-0.tar", "test2017-0.tar"], {"train": [0], "val": [1]}),
    (["train.txt", "val.txt", "test.txt"], {"train": [0], "val": [1]}),
    (["0.tar", "1.tar"], {"all": [0, 1]}),
    (["strain-0.tar", "strain-1.tar"], {"all": [0, 1]}),  # a part of a word is no word
    (["train/0.tar", "val/0.tar"], {"train": [0], "val": [1]}),
    (["train-0.tar"], {"train": [0]}),
])
def test_splits_by_the_names_of_files(names, found):
    paths = [Path("/train/set") / name for name in names]  # folders above all of them tell nothing
    assert split_files(paths) == {split: [paths[at] for at in places] for split, places in found.items()}


def test_names_of_which_only_some_tell_a_split():
    with pytest.raises(DataError, match=r"of 3 files in /x, 1 have no train, val or test in their names: more\.tar"):
        split_files([Path("/x/train-0.tar"), Path("/x/val-0.tar"), Path("/x/more.tar")])


def test_choose_splits_of_folders_known_by_name_alone():
    both = {"train": "train", "val": "test"}
    assert choose_splits("x", ["train", "test", "more"], True, lambda name: False) == both
    assert choose_splits("x", ["train", "car"], False, lambda name: False) == {}
    assert choose_splits("x", ["Train", "dev", "test"], False, lambda name: True) == {"train": "Train", "val": "dev"}
    with pytest.raises(DataError, match="x holds train/, training/; call"):
        choose_splits("x", ["training", "train"], False, lambda name: False)


def test_missing_files_are_listed_up_to_a_limit(tmp_path):
    (tmp_path / "there").touch()
    require_files([tmp_path / "there"], "it")
    with pytest.raises(DataError) as refused:
        require_files([tmp_path / "there", *(tmp_path / f"{i:02}" for i in range(23))], "the list x")
    lines = str(refused.value).splitlines()
    assert lines[0] == "the list x: 23 of 24 files are not there:"
    assert lines[1:] == [*(f"  {tmp_path}/{i:02}" for i in range(20)), "  and 3 more"]
