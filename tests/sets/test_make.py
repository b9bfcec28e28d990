import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cases import each
from PIL import Image

from patchssl.runtime.errors import DataError, FolderInUse, UsageError
from patchssl.runtime.lock import locked
from patchssl.runtime.pickles import load_plain_pickle
from patchssl.sets import make as module
from patchssl.sets.copydays import open_copydays
from patchssl.sets.make import crop_box, make_copydays, make_revisited

QUALITIES = (3, 5, 8, 10, 15, 20, 30, 50, 75)
PERCENTS = (10, 15, 20, 30, 40, 50, 60, 70, 80)
WIDTH, HEIGHT = 200, 152


def ramp(blue, width=WIDTH, height=HEIGHT):
    """A photograph whose red says where a pixel lies from left (20) to right (220), whose green says it downwards."""
    x = 20 + 200 * (np.arange(width) + 0.5) / width
    y = 20 + 200 * (np.arange(height) + 0.5) / height
    return Image.fromarray(np.stack([np.tile(x, (height, 1)), np.tile(y[:, None], (1, width)),
                                     np.full((height, width), blue)], axis=-1).round().astype(np.uint8))


def positions(image):
    """Share of the width at the left and right edge, of the height at the top and bottom edge, read from colors."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    red, green = (pixels[..., 0].mean(0) - 20) / 200, (pixels[..., 1].mean(1) - 20) / 200
    ends = []
    for values in (red, green):  # a line through all pixels: JPEG spoils each a little
        slope, start = np.polyfit(np.arange(len(values)) + 0.5, values, 1)
        ends += [start, start + slope * len(values)]
    return ends


def photographs(folder, blues, **options):
    folder.mkdir(parents=True)
    for number, blue in enumerate(blues):
        ramp(blue, **options).save(folder / f"{number:02d}.png")
    return folder


def contents(root):
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*")) if path.is_file()}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("in") / "photos", (0, 50, 100, 150, 200))


@pytest.fixture(scope="module")
def copydays(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "copydays"
    made = make_copydays(folder, out, seed=3)
    assert made.counts == {"original": 5, "jpegqual": 45, "crops": 45, "strong": 7}
    return out


@pytest.fixture(scope="module")
def revisited(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "revisited"
    made = make_revisited(folder, out, seed=3)
    assert made.counts == {"queries": 5, "database images": 30}
    return out


def test_the_reader_takes_it(copydays):
    found = open_copydays(copydays, needs_distractors=False, needs_whitening=False)
    assert not found.official
    assert list(found.originals.names) == ["300000.jpg", "300100.jpg", "300200.jpg", "300300.jpg", "300400.jpg"]
    assert found.blocks[1].originals.tolist() == [0, 1, 1, 2, 3, 3, 4]
    assert all(image.size for block in found.blocks for image in map(block.images.pixels, range(len(block.images))))


def test_dinos_rule_of_the_first_four_characters_holds(copydays):
    originals = sorted(path.name for path in (copydays / "original").iterdir())
    for path in (copydays / "strong").iterdir():
        assert [name[:4] == path.name[:4] for name in originals].count(True) == 1
        assert path.name not in originals


def test_originals_are_the_photographs(copydays, folder):
    for number, name in enumerate(names_in(folder)):
        original, source = Image.open(copydays / f"original/30{number:02d}00.jpg"), Image.open(folder / name)
        assert original.size == source.size == (WIDTH, HEIGHT)
        assert np.abs(np.asarray(original, dtype=int) - np.asarray(source, dtype=int)).mean() < 2


@each("quality", QUALITIES)
def test_jpegqual_is_a_quarter_of_each_side_at_this_quality(copydays, quality):
    file = io.BytesIO()
    ramp(0).save(file, "JPEG", quality=quality)
    copy = Image.open(copydays / f"jpegqual/{quality}/300200.jpg")
    assert copy.quantization == Image.open(file).quantization
    assert copy.size == (WIDTH // 4, HEIGHT // 4)
    if quality >= 50:
        source = ramp(100).resize(copy.size, Image.Resampling.BOX)
        assert np.abs(np.asarray(copy, dtype=int) - np.asarray(source, dtype=int)).mean() < 4


@each("percent", PERCENTS)
def test_crops_lose_this_share_of_the_area(copydays, percent):
    for number in range(5):
        with Image.open(copydays / f"crops/{percent}/30{number:02d}00.jpg") as crop:
            left, right, top, bottom = positions(crop)
            assert crop.width * crop.height / (WIDTH * HEIGHT) == pytest.approx(1 - percent / 100, abs=0.012)
            assert (right - left) * (bottom - top) == pytest.approx(1 - percent / 100, abs=0.03)  # nor is it scaled
            assert crop.width / crop.height == pytest.approx(WIDTH / HEIGHT, rel=0.03)
            assert min(left, top) > -0.02
            assert max(right, bottom) < 1.02


def test_the_box_of_a_crop_by_hand():
    assert crop_box((100, 50), 75, 0.5, 1.0) == (25, 25, 75, 50)  # half of either side, at the bottom in the middle
    assert crop_box((100, 50), 36, 0.0, 0.0) == (0, 0, 80, 40)


def test_crops_lie_one_within_the_other_at_different_places(copydays):
    places = set()
    for number in range(5):
        ends = [positions(Image.open(copydays / f"crops/{percent}/30{number:02d}00.jpg")) for percent in PERCENTS]
        for (left, right, top, bottom), (left2, right2, top2, bottom2) in pairwise(ends):
            assert left2 > left - 0.02 and top2 > top - 0.02 and right2 < right + 0.02 and bottom2 < bottom + 0.02
        places.add(tuple(round(end, 1) for end in ends[-1]))
    assert len(places) > 2


def test_the_listing_says_what_was_done(copydays, folder):
    listing = json.loads((copydays / "made.json").read_text())
    assert set(listing["images"]) == set(contents(copydays)) - {"made.json"}
    assert (listing["layout"], listing["seed"], listing["size"], listing["left_out"]) == ("copydays", 3, 1024, {})
    assert listing["images"]["original/300300.jpg"] == {"source": "03.png"}
    assert str(folder) not in (copydays / "made.json").read_text()
    for file, record in listing["images"].items():
        block = file.split("/")[0]
        if block == "crops":
            left, top, right, bottom = record["box"]
            assert Image.open(copydays / file).size == (right - left, bottom - top)
            seen = positions(Image.open(copydays / file))
            assert seen == pytest.approx([left / WIDTH, right / WIDTH, top / HEIGHT, bottom / HEIGHT], abs=0.03)
        elif block == "strong":
            assert record["original"][:4] == Path(file).stem[:4]
            assert record["kind"] in module.STRONG_EDITS
            assert record["draws"]


def test_every_kind_of_strong_edit_is_dealt_equally_often(tmp_path):
    folder = photographs(tmp_path / "in", range(0, 255, 22), width=128, height=96)  # 12 originals, 18 strong copies
    make_copydays(folder, tmp_path / "out", size=128)
    images = json.loads((tmp_path / "out/made.json").read_text())["images"]
    kinds = [record["kind"] for file, record in images.items() if file.startswith("strong/")]
    assert len(kinds) == 18
    assert all(kinds.count(kind) == 2 for kind in module.STRONG_EDITS)
    draws = {json.dumps(record["draws"]) for file, record in images.items() if file.startswith("strong/")}
    assert len(draws) == 18  # each image its own


@pytest.mark.parametrize("make", [make_copydays, make_revisited])
def test_same_seed_same_bytes_whoever_works(make, folder, tmp_path):
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    make(folder, first, seed=7)
    make(folder, second, seed=7, workers=3)
    make(folder, other, seed=8)
    assert contents(first) == contents(second)
    assert contents(first).keys() == contents(other).keys()
    equal = {name for name, digest in contents(first).items() if contents(other)[name] == digest}
    drawn = {name for name in contents(first)
             if name.startswith(("crops/", "strong/")) or name.count("_") == 2 or name == "made.json"}
    assert equal == contents(first).keys() - drawn - {"gnd_made.pkl"}


@pytest.mark.parametrize("make", [make_copydays, make_revisited])
def test_what_is_made_of_a_photograph_does_not_depend_on_those_after_it(make, folder, tmp_path):
    make(folder, tmp_path / "five")
    more = photographs(tmp_path / "in", (0, 50, 100, 150, 200, 250))
    make(more, tmp_path / "six")
    five, six = contents(tmp_path / "five"), contents(tmp_path / "six")
    assert len(six) > len(five)
    for name in five.keys() - {"made.json", "gnd_made.pkl"}:
        assert six[name] == five[name], name


def test_photographs_are_scaled_down_never_up_and_upright(tmp_path):
    folder = photographs(tmp_path / "in", (0, 100), width=300, height=200)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 300 x 200 stored, 200 x 300 meant
    ramp(200, width=300, height=200).save(folder / "turned.jpg", exif=exif)
    make_copydays(folder, tmp_path / "small", size=150)
    make_copydays(folder, tmp_path / "large")
    make_copydays(folder, tmp_path / "whole", size=None)
    for name, (long, short) in (("small", (150, 100)), ("large", (300, 200))):
        sizes = [(long, short), (long, short), (short, long)]
        assert [Image.open(tmp_path / name / f"original/300{i}00.jpg").size for i in range(3)] == sizes
    assert contents(tmp_path / "whole/original") == contents(tmp_path / "large/original")
    left, right, top, bottom = positions(Image.open(tmp_path / "small/original/300200.jpg").rotate(90, expand=True))
    assert (left, right, top, bottom) == pytest.approx((0, 1, 0, 1), abs=0.03)  # turned back, it is as stored


def test_further_photographs(folder, tmp_path):
    more = photographs(tmp_path / "more", (25, 100, 225))  # the middle one is the third original
    made = make_copydays(folder, tmp_path / "out", distractors=more, whitening=more, size=128)
    found = open_copydays(tmp_path / "out")
    assert list(found.distractors.names) == ["000000.jpg", "000001.jpg"]
    assert list(found.whitening.names) == ["000000.jpg", "000001.jpg", "000002.jpg"]
    assert found.distractors.pixels(1).shape == (97, 128, 3)
    assert made.counts["distractors"] == 2
    assert made.left_out == {"distractors: 01.png": "looks like 02.png"}
    images = json.loads((tmp_path / "out/made.json").read_text())["images"]
    assert images["distractors/000001.jpg"] == {"source": "02.png"}


def test_distractors_that_are_the_originals(folder, tmp_path):
    with pytest.raises(DataError, match=r"holds 0 of the 1 or more photographs that are needed as distractors; skipped"
                                        r":\n  distractors: 00.png: looks like 00.png"):
        make_copydays(folder, tmp_path / "out", distractors=folder)
    assert names_in(tmp_path) == []


def test_what_cannot_serve_is_left_out_and_named(tmp_path):
    folder = photographs(tmp_path / "in", (0, 100))
    ramp(0).resize((400, 304)).save(folder / "enlarged.jpg", quality=80)
    Image.new("RGB", (200, 200), (9, 99, 199)).save(folder / "flat.png")
    ramp(200, width=63, height=80).save(folder / "icon.png")
    made = make_copydays(folder, tmp_path / "out")
    assert made.left_out == {"enlarged.jpg": "looks like 00.png", "flat.png": "one color",
                             "icon.png": "63 x 80 pixels are too few"}
    assert made.counts["original"] == 2
    assert "skipped 3 photographs: enlarged.jpg (looks like 00.png), flat" in made.describe()
    assert json.loads((tmp_path / "out/made.json").read_text())["left_out"] == made.left_out


@pytest.mark.parametrize("make", [make_copydays, make_revisited])
def test_unreadable_photographs_are_all_listed(make, tmp_path):
    folder = photographs(tmp_path / "in", (0, 100))
    for number in range(30):
        (folder / f"bad{number}.jpg").write_text("no image")
    with pytest.raises(DataError, match="30 of 32 photographs cannot be read") as refused:
        make(folder, tmp_path / "out")
    assert all(f"bad{number}.jpg: no known image format" in str(refused.value) for number in range(30))
    assert names_in(tmp_path) == ["in"]


@pytest.mark.parametrize("make", [make_copydays, make_revisited])
def test_too_few_photographs(make, tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        make(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.heic").touch()
    with pytest.raises(DataError, match=r"holds no photograph \(1 file with other extensions \(.heic 1\).*\)"):
        make(tmp_path / "in", tmp_path / "out")
    for name in ("a.png", "b.png"):
        ramp(0).save(tmp_path / "in" / name)
    with pytest.raises(DataError, match=r"holds 1 of the 2 or more photographs .*\n  b.png: looks like a.png"):
        make(tmp_path / "in", tmp_path / "out")
    assert names_in(tmp_path) == ["in"]


def test_too_many_photographs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_ORIGINALS", 4)
    with pytest.raises(UsageError, match="holds 5 photographs and names are left for 4 originals"):
        make_copydays(folder, tmp_path / "out")
    assert len(f"{module._FIRST_NAME + 7000 - 1}00") == 6


@pytest.mark.parametrize("make", [make_copydays, make_revisited])
def test_the_place_must_be_free_and_elsewhere(make, folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(UsageError, match=f"{name} is there and not empty"):
            make(folder, tmp_path / name)
    with pytest.raises(UsageError, match="lies inside"):
        make(folder, folder / "out")
    (tmp_path / "left.partial").mkdir()
    with pytest.raises(UsageError, match=r"left\.partial is what a run left that was killed: remove it first"):
        make(folder, tmp_path / "left")
    (tmp_path / "empty").mkdir()
    make(folder, tmp_path / "empty")
    assert (tmp_path / "empty/made.json").is_file()
    assert names_in(tmp_path) == ["empty", "file", "full", "left.partial"]


@each("numbers", [{"seed": -1}, {"size": 127}, {"workers": 0}])
@each("make", [make_copydays, make_revisited])
def test_numbers_that_make_no_sense(make, folder, tmp_path, numbers):
    with pytest.raises(UsageError, match=f"{next(iter(numbers))} {next(iter(numbers.values()))}"):
        make(folder, tmp_path / "out", **numbers)


@pytest.mark.parametrize("make", [make_copydays, make_revisited])
def test_progress_counts_to_the_end(make, tmp_path):
    folder = photographs(tmp_path / "in", (0, 0, 100))  # one is left out, and so takes one step only
    seen = []
    make(folder, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]


@each("step", [1, 6, 10])
@each("make", [make_copydays, make_revisited])
def test_an_interruption_leaves_nothing(make, folder, tmp_path, step):
    def interrupt(done, total):
        if done == step:
            assert names_in(tmp_path) == [".out.lock", "out.partial"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(folder, tmp_path / "out", progress=interrupt, workers=2)
    assert names_in(tmp_path) == []


def test_two_at_once_do_not_mix(folder, tmp_path):
    remedy = "wait for it to end, or choose another --out"
    with locked(tmp_path, file=".out.lock"), pytest.raises(FolderInUse, match=f"is in use by process .*; {remedy}"):
        make_revisited(folder, tmp_path / "out")
    make_revisited(folder, tmp_path / "out")
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("make", ["make_copydays", "make_revisited"])
def test_a_kill_leaves_no_half_set(make, folder, tmp_path):
    program = (f"import os\nfrom patchssl.sets.make import {make}\n"
               f"def kill(done, total):\n    if done == 8:\n        os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
               f"{make}({str(folder)!r}, 'out', progress=kill)")
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert names_in(tmp_path) == [".out.lock", "out.partial"]
    with pytest.raises(UsageError, match="that was killed: remove it first"):  # and nobody has the lock any more
        getattr(module, make)(folder, tmp_path / "out")


def truth(root, name="made"):
    with (root / f"gnd_{name}.pkl").open("rb") as file:
        return load_plain_pickle(file, "gnd")


def test_the_ground_truth_is_as_the_official_one(revisited):
    found = truth(revisited)
    assert set(found) == {"imlist", "qimlist", "gnd"}
    assert found["qimlist"] == [f"made_{number:04d}" for number in range(5)]
    files = {path.stem for path in (revisited / "jpg").glob("*.jpg")}
    assert sorted(found["imlist"] + found["qimlist"]) == sorted(files)
    assert found["imlist"] != sorted(found["imlist"])
    data = (revisited / "gnd_made.pkl").read_bytes()
    assert data[:2] == b"\x80\x02"  # protocol 2
    assert pickle.loads(data) == found


def test_every_view_belongs_to_one_query_and_one_level(revisited):
    found = truth(revisited)
    taken = []
    for query, entry in zip(found["qimlist"], found["gnd"], strict=True):
        assert set(entry) == {"bbx", "easy", "hard", "junk"}
        assert [len(entry[level]) for level in ("easy", "hard", "junk")] == [2, 3, 1]
        for level in ("easy", "hard", "junk"):
            assert all(found["imlist"][index].startswith(query + "_") for index in entry[level])
            taken += entry[level]
        left, top, right, bottom = entry["bbx"]
        assert 0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT
        assert 0.15 < (right - left) * (bottom - top) / (WIDTH * HEIGHT) < 0.45
    assert sorted(taken) == list(range(len(found["imlist"])))


def test_fewer_queries_leave_photographs_as_negatives(folder, tmp_path):
    made = make_revisited(folder, tmp_path / "out", name="two", num_queries=2)
    found = truth(tmp_path / "out", "two")
    assert made.counts == {"queries": 2, "database images": 15}
    assert found["qimlist"] == ["two_0000", "two_0001"]
    assert {"two_0002", "two_0003", "two_0004"} < set(found["imlist"])
    positives = {index for entry in found["gnd"] for level in ("easy", "hard", "junk") for index in entry[level]}
    assert {found["imlist"][index] for index in set(range(15)) - positives} == {"two_0002", "two_0003", "two_0004"}


def test_the_listing_of_a_revisited_set(revisited):
    listing = json.loads((revisited / "made.json").read_text())
    assert set(listing["images"]) == set(contents(revisited)) - {"made.json", "gnd_made.pkl"}
    for query, entry in zip(truth(revisited)["qimlist"], truth(revisited)["gnd"], strict=True):
        record = listing["images"][f"jpg/{query}.jpg"]
        assert record["bbx"] == entry["bbx"]
        assert record["source"] == f"{query[-2:]}.png"
        for level in ("easy", "hard", "junk"):
            for index in entry[level]:
                view = listing["images"][f"jpg/{truth(revisited)['imlist'][index]}.jpg"]
                assert (view["query"], view["level"]) == (query, level)


@each("name", ["", "a/b", "roxford5k", "rparis6k", "ä b"])
def test_names_that_a_revisited_set_cannot_have(folder, tmp_path, name):
    with pytest.raises(UsageError, match=f"cannot be called '{name}'"):
        make_revisited(folder, tmp_path / "out", name=name)


def test_no_queries_are_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="0 queries"):
        make_revisited(folder, tmp_path / "out", num_queries=0)


def test_views_are_large_enough_for_a_few_patches_at_half_their_size(tmp_path):
    folder = photographs(tmp_path / "in", (0, 100), width=128, height=64)
    make_revisited(folder, tmp_path / "out", size=128)
    sizes = [Image.open(path).size for path in (tmp_path / "out/jpg").iterdir()]
    assert len(sizes) == 14
    assert min(map(min, sizes)) == 64
