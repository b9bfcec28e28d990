import numpy as np
import pytest
from cases import each
from PIL import Image

from patchssl.runtime.errors import DataError, UsageError
from patchssl.sets.copydays import open_copydays

BLOCKS = ["original", "strong", *(f"jpegqual/{q}" for q in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
          *(f"crops/{p}" for p in (10, 15, 20, 30, 40, 50, 60, 70, 80))]
ORIGINALS = [f"{2000 + i}00" for i in range(157)]
STRONG = [f"{2000 + i}{copy:02d}" for i in range(157) for copy in range(1, 3 if i < 72 else 2)]


def layout(root, originals, strong, extra=True):
    """A set in Copydays' layout whose files are empty: nothing here may read an image."""
    for block in BLOCKS:
        (root / block).mkdir(parents=True)
        for stem in strong if block == "strong" else originals:
            (root / block / f"{stem}.jpg").touch()
    for name in ("distractors", "whitening") if extra else ():
        (root / name / "deep").mkdir(parents=True)
        for number in range(3):
            (root / name / "deep" / f"{number}.jpg").touch()
    return root


@pytest.fixture
def official(tmp_path):
    return layout(tmp_path / "copydays", ORIGINALS, STRONG)


@pytest.fixture
def small(tmp_path):
    """Three originals of one's own, five strong copies."""
    return layout(tmp_path / "own", ["300000", "300100", "777700"], ["300001", "300002", "300101", "777701", "777799"])


def test_all_blocks_of_copydays_itself(official):
    found = open_copydays(official)
    assert [block.name for block in found.blocks] == BLOCKS
    assert [len(block.images) for block in found.blocks] == [157, 229] + 18 * [157]
    assert found.official
    assert list(found.originals.names) == [f"{stem}.jpg" for stem in ORIGINALS]
    assert "157 originals, 3,055 copies, 3 in distractors, 3 in whitening" in found.describe()


def test_every_query_has_the_original_that_the_official_rules_give_it(official):
    found = open_copydays(official)
    for block in found.blocks:
        names, originals = list(block.images.names), list(found.originals.names)
        assert names == sorted(names)
        expected = [[j for j, original in enumerate(originals) if original[:4] == name[:4]] for name in names]
        assert [[index] for index in block.originals] == expected
        assert block.originals.dtype == np.int64


def test_a_set_of_ones_own(small):
    found = open_copydays(small)
    assert not found.official
    assert found.blocks[1].originals.tolist() == [0, 0, 1, 2, 2]
    assert all(block.originals.tolist() == [0, 1, 2] for block in found.blocks if block.name != "strong")
    assert found.describe().startswith("a set in Copydays' layout in ")


def test_images_are_read_where_they_lie(small):
    Image.new("RGB", (5, 4), (255, 0, 0)).save(small / "crops/80/300100.jpg", "PNG")
    block = open_copydays(small).blocks[-1]
    assert block.images.pixels(1).shape == (4, 5, 3)
    assert block.images.path(1) == small / "crops/80/300100.jpg"


def test_extensions_in_any_case_and_files_that_are_no_images(small):
    (small / "crops/10/300000.jpg").rename(small / "crops/10/300000.JPG")
    (small / "strong/300001.jpg").rename(small / "strong/300001.Png")
    for name in ("original/Thumbs.db", "strong/Thumbs.db", "strong/.DS_Store", "crops/10/._300000.jpg",
                 "whitening/a.txt"):
        (small / name).touch()
    found = open_copydays(small)
    assert len(found.blocks[1].images) == 5
    assert found.others == {".db": 2, ".txt": 1}
    assert "skipped 3 files with other extensions (.db 2, .txt 1)" in found.describe()


@each("block", BLOCKS)
def test_a_missing_block_is_named(official, block):
    (official / block).rename(official / "elsewhere")
    with pytest.raises(DataError, match=f"lacks 1 of Copydays' 20 blocks: {block};"):
        open_copydays(official)
    (official / "elsewhere").rename(official / block)


def test_all_missing_blocks_are_named(tmp_path):
    with pytest.raises(DataError, match=r"lacks 20 of Copydays' 20 blocks: original, strong, .*crops/80; .*archives"):
        open_copydays(tmp_path)


def test_archives_unpacked_into_one_place(tmp_path):
    (tmp_path / "200000.jpg").touch()
    with pytest.raises(DataError, match=r"hold no folder: unpack them into original/ and strong/"):
        open_copydays(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        open_copydays(tmp_path / "nothing")


@each("block", [name for name in BLOCKS if name != "strong"])
def test_a_missing_image_of_copydays_is_named(official, block):
    hidden = (official / block / "204200.jpg").rename(official / "elsewhere.jpg")
    with pytest.raises(DataError, match=rf"{block} holds 156 of 157 \(without 204200\)"):
        open_copydays(official)
    hidden.rename(official / block / "204200.jpg")


def test_a_missing_strong_copy_is_counted(official):
    (official / "strong/200001.jpg").unlink()
    with pytest.raises(DataError, match="strong holds 228 of 229"):
        open_copydays(official)


def test_an_image_too_many_is_named(official):
    (official / "jpegqual/3/209999.jpg").touch()
    with pytest.raises(DataError, match=r"jpegqual/3 holds 158 of 157 \(too many: 209999\)"):
        open_copydays(official)


def test_the_right_number_of_wrong_images(official):
    (official / "crops/50/200700.jpg").rename(official / "crops/50/200799.jpg")
    with pytest.raises(DataError, match=r"crops/50 holds no copy of 200700 and 200799, which .*original does not"):
        open_copydays(official)


def test_wrong_counts_are_all_listed(official):
    for name in ("crops/10/200000.jpg", "crops/20/200000.jpg"):
        (official / name).unlink()
    with pytest.raises(DataError, match=r"crops/10 holds 156 .*; crops/20 holds 156"):
        open_copydays(official)


def test_a_block_of_ones_own_set_that_is_not_equal(small):
    (small / "jpegqual/75/777700.jpg").unlink()
    with pytest.raises(DataError, match="jpegqual/75 holds no copy of 777700: every block"):
        open_copydays(small)


def test_a_strong_copy_of_nothing(small):
    (small / "strong/888801.jpg").touch()
    with pytest.raises(DataError, match="strong holds 888801, but no original begins with the same 4"):
        open_copydays(small)


def test_originals_that_strong_copies_could_not_tell_apart(tmp_path):
    root = layout(tmp_path / "own", ["beach1", "beach2"], ["beach1-strong"])
    with pytest.raises(DataError, match=r"beach1 and beach2 .*the same 4 characters.*300001, 300101"):
        open_copydays(root)


@pytest.mark.parametrize("block", ["original", "strong", "crops/10"])
def test_two_files_of_one_stem(small, block):
    stem = "300001" if block == "strong" else "300000"
    (small / block / f"{stem}.png").touch()
    with pytest.raises(DataError, match=rf"{block} holds both {stem}.jpg and {stem}.png: remove one"):
        open_copydays(small)


def test_an_empty_block(small):
    for path in (small / "strong").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="strong holds no image"):
        open_copydays(small)


@pytest.mark.parametrize("kind", ["distractors", "whitening"])
def test_extra_images_lie_beside_the_blocks_or_where_one_says(small, tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x.jpeg").touch()
    assert list(getattr(open_copydays(small), kind).names) == ["deep/0.jpg", "deep/1.jpg", "deep/2.jpg"]
    chosen = open_copydays(small, **{kind: tmp_path / "mine"})
    assert list(getattr(chosen, kind).names) == ["x.jpeg"]


@pytest.mark.parametrize("kind", ["distractors", "whitening"])
def test_missing_extra_images_are_an_error_unless_the_protocol_has_none(small, tmp_path, kind):
    (small / kind).rename(tmp_path / "gone")
    remedy = f"put .*--{kind} FOLDER.*dino-no{kind}"
    with pytest.raises(DataError, match=f"no folder .*{kind} for the {kind} images: {remedy}"):
        open_copydays(small)
    assert getattr(open_copydays(small, **{f"needs_{kind}": False}), kind) is None
    (small / kind).mkdir()
    (small / kind / "README").touch()
    with pytest.raises(DataError, match=f"holds no image for {kind}"):
        open_copydays(small)


@pytest.mark.parametrize("kind", ["distractors", "whitening"])
def test_extra_images_are_never_used_or_ignored_in_silence(small, kind):
    assert getattr(open_copydays(small, **{f"needs_{kind}": False}), kind) is None
    with pytest.raises(UsageError, match=f"--{kind} .*has no {kind} images"):
        open_copydays(small, **{f"needs_{kind}": False, kind: small / kind})


def test_the_fingerprint_is_of_what_takes_part(small, tmp_path):
    first = open_copydays(small).fingerprint
    moved = small.rename(tmp_path / "moved")
    assert open_copydays(moved).fingerprint == first
    plain = open_copydays(moved, needs_distractors=False).fingerprint
    (moved / "distractors/deep/0.jpg").write_bytes(b"1")
    assert open_copydays(moved, needs_distractors=False).fingerprint == plain != first
    assert open_copydays(moved).fingerprint != first
    (moved / "crops/40/300000.jpg").write_bytes(b"1")
    assert open_copydays(moved, needs_distractors=False).fingerprint != plain


def test_truncated_files_are_allowed_everywhere_or_nowhere(small):
    for allowed in (False, True):
        found = open_copydays(small, allow_truncated=allowed)
        parts = [*(block.images for block in found.blocks), found.distractors, found.whitening]
        assert {images.allow_truncated for images in parts} == {allowed}


@each("kind", ["distractors", "whitening"])
@each("place", [".", "..", "strong", "crops/20", "crops", "jpegqual"])
def test_images_of_the_set_itself_are_no_extra_images(small, kind, place):
    """As distractors its copies would bury every original, and no number would look wrong."""
    with pytest.raises(UsageError, match=f"holds images of the set itself .*the {kind} images have to be others"):
        open_copydays(small, **{kind: small / place})
