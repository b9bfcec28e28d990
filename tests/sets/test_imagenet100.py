from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from cases import each

from patchssl.data.open import open_pair
from patchssl.runtime.errors import DataError, UsageError
from patchssl.sets.imagenet100 import class_list, known_lists, make_imagenet100

OTHERS = ("n01440764", "n15075141")  # of ImageNet, the first of them in the list kaggle


@pytest.fixture
def imagenet(tmp_path):
    """102 class folders in either split, an image in each."""
    root = tmp_path / "imagenet"
    for split in ("train", "val"):
        for name in (*class_list(), *OTHERS):
            (root / split / name).mkdir(parents=True)
            (root / split / name / f"{split}_{name}.JPEG").write_bytes(name.encode())
    return root


@pytest.mark.parametrize("name", known_lists())
def test_lists_hold_a_hundred_classes_of_imagenet(name):
    """timm's list of ImageNet-1K's classes is another source."""
    classes = class_list(name)
    assert len(set(classes)) == len(classes) == 100
    all_of_them = files("timm.data").joinpath("_info", "imagenet_synsets.txt").read_text().split()
    assert len(all_of_them) == 1000
    assert set(classes) <= set(all_of_them)


def test_lists_are_those_they_say():
    assert known_lists() == ("cmc", "kaggle")
    assert class_list()[:3] == ("n02869837", "n01749939", "n02488291")  # as in HobbitLong/CMC, issue 21
    assert class_list("kaggle")[0] == "n01968897"
    assert len(set(class_list("cmc")) & set(class_list("kaggle"))) == 8


def test_links_to_the_classes_of_the_list_and_no_others(imagenet, tmp_path):
    steps = []
    out = make_imagenet100(imagenet, tmp_path / "new" / "in100", progress=lambda *step: steps.append(step))
    for split in ("train", "val"):
        assert sorted(path.name for path in (out / split).iterdir()) == sorted(class_list())
        assert all(path.is_symlink() for path in (out / split).iterdir())
        assert (out / split / class_list()[7]).resolve() == imagenet / split / class_list()[7]
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]
    assert steps[-1] == (200, 200) and len(steps) == 200
    train, val = open_pair(out)
    assert len(train) == len(val) == 100
    assert train.classes == val.classes == tuple(sorted(class_list()))
    np.testing.assert_array_equal(train.labels, val.labels)


def test_links_are_followed_from_anywhere(imagenet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_imagenet100("imagenet", "in100")
    monkeypatch.chdir("/")
    assert len(list((tmp_path / "in100" / "val").glob("*/*.JPEG"))) == 100


def test_copies_where_links_are_not_wanted(imagenet, tmp_path):
    out = make_imagenet100(imagenet, tmp_path / "in100", copy=True)
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert len(list(out.rglob("*.JPEG"))) == 200


def test_where_links_cannot_be_made_nothing_is_left(imagenet, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(DataError, match=r"Operation not supported.*copy the images instead \(--copy\)"):
        make_imagenet100(imagenet, tmp_path / "in100")
    assert [path.name for path in tmp_path.iterdir()] == ["imagenet"]


def test_a_list_of_ones_own(imagenet, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("# mine\n\n" + "\n".join([*class_list()[:98], f"{OTHERS[0]}  # tench", OTHERS[1]]) + "\n")
    out = make_imagenet100(imagenet, tmp_path / "in100", classes=own)
    assert set(OTHERS) <= {path.name for path in (out / "train").iterdir()}
    assert class_list(str(own))[98:] == OTHERS


@each(("change", "message"), [
    (lambda names: names[:99], "names 99 classes; ImageNet-100 has 100"),
    (lambda names: [*names[:99], names[0]], f"names {class_list()[0]} more than once"),
    (lambda names: [*names[:99], "tench"], "holds 'tench', which is no WordNet id"),
    (lambda names: [*names[:99], "../../etc"], "no WordNet id"),
    (lambda names: [*names[:99], "n014407641"], "no WordNet id"),
])
def test_wrong_lists_are_refused(imagenet, tmp_path, change, message):
    own = tmp_path / "own.txt"
    own.write_text("\n".join(change(list(class_list()))))
    with pytest.raises(DataError, match=message):
        make_imagenet100(imagenet, tmp_path / "in100", classes=own)


def test_unknown_lists_and_unreadable_ones(tmp_path):
    with pytest.raises(UsageError, match=r"the list 'cmd' is unknown; did you mean 'cmc'\?"):
        class_list("cmd")
    with pytest.raises(DataError, match="cannot be read"):
        class_list(tmp_path / "absent.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        class_list(tmp_path / "binary")


def test_absent_and_empty_classes_are_named(imagenet, tmp_path):
    first, second = class_list()[:2]
    (imagenet / "val" / first / f"val_{first}.JPEG").unlink()
    with pytest.raises(DataError, match=f"val has no images in {first}"):
        make_imagenet100(imagenet, tmp_path / "in100")
    (imagenet / "val" / first).rmdir()
    (imagenet / "val" / second / f"val_{second}.JPEG").unlink()
    (imagenet / "val" / second).rmdir()
    with pytest.raises(DataError, match=rf"val lacks 2 of the 100 classes: {first}, {second}$"):
        make_imagenet100(imagenet, tmp_path / "in100")
    assert not (tmp_path / "in100").exists()


def test_what_is_no_root_of_imagenet(imagenet, tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*train.train: give ImageNet's own"):
        make_imagenet100(imagenet / "train", tmp_path / "in100")
    inner = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    (inner / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=f"; give {inner}"):
        make_imagenet100(tmp_path / "kaggle", tmp_path / "in100")
    (tmp_path / "flat" / "val").mkdir(parents=True)
    (tmp_path / "flat" / "train").symlink_to(imagenet / "train")
    (tmp_path / "flat" / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(DataError, match="val must be sorted into class folders first"):
        make_imagenet100(tmp_path / "flat", tmp_path / "in100")


def test_no_set_is_replaced_and_none_made_within_another(imagenet, tmp_path):
    make_imagenet100(imagenet, tmp_path / "in100")
    with pytest.raises(UsageError, match="is there and not empty"):
        make_imagenet100(imagenet, tmp_path / "in100", classes="cmc")
    with pytest.raises(UsageError, match="lies inside"):
        make_imagenet100(imagenet, imagenet / "train" / "in100")
