import copy
import functools
import os
import pickle
import struct

import numpy as np
import pytest
from cases import each

from patchssl.runtime.errors import DataError, UsageError
from patchssl.sets.revisited import (
    absent_images,
    as_truths,
    find_ground_truth,
    present_names,
    read_ground_truth,
    require_images,
)

IMAGES = [f"image_{i:03d}" for i in range(30)]
CONTENT = {
    "imlist": IMAGES,
    "qimlist": ["tower_1", "image_004"],  # the second is a database image too
    "gnd": [
        {"bbx": [1.5, 2.0, 30.0, 40.0], "easy": [3, 1], "hard": [], "junk": np.array([7])},
        {"bbx": np.array([0, 0, 5, 5]), "easy": (), "hard": np.array([29, 0], dtype=np.uint16), "junk": []},
    ],
}


def save(tmp_path, content, protocol=4):
    path = tmp_path / "gnd_mine.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def python2(value):
    """Opcodes of protocol 2 as Python 2's cPickle wrote them, byte strings included."""
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"u"
    return b"](" + b"".join(map(python2, value)) + b"e"


@each("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_labels_come_back_as_arrays_of_integers(tmp_path, protocol):
    truth = read_ground_truth(save(tmp_path, CONTENT, protocol))
    assert truth.imlist == tuple(IMAGES)
    assert truth.qimlist == ("tower_1", "image_004")
    first, second = truth.gnd
    assert [part.tolist() for part in (first.easy, first.hard, first.junk)] == [[3, 1], [], [7]]
    assert [part.tolist() for part in (second.easy, second.hard, second.junk)] == [[], [29, 0], []]
    assert {part.dtype for entry in truth.gnd for part in (entry.easy, entry.hard, entry.junk)} == {np.dtype(np.int64)}
    assert first.bbx.tolist() == [1.5, 2, 30, 40]


def test_a_pickle_of_python_2_is_read(tmp_path):
    content = {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [
        {"bbx": [0.0, 0.0, 9.5, 9.0], "easy": [1], "hard": [], "junk": [0]}]}
    data = b"\x80\x02" + python2(content) + b"."
    assert pickle.loads(data, encoding="latin1") == content  # the test's own bytes
    path = tmp_path / "gnd_old.pkl"
    path.write_bytes(data)
    truth = read_ground_truth(path)
    assert (truth.imlist, truth.gnd[0].easy.tolist(), truth.gnd[0].bbx.tolist()) == (("a", "b"), [1], [0, 0, 9.5, 9])


def test_nothing_in_the_file_is_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'trace'}",)

    with pytest.raises(DataError, match=r"gnd_mine.pkl is refused: the pickle asks for .*system"):
        read_ground_truth(save(tmp_path, {**CONTENT, "gnd": [Attack()]}))
    assert not (tmp_path / "trace").exists()


def without(key):
    return lambda content: content.pop(key)


def entry(number, **changes):
    return lambda content: content["gnd"][number].update(changes)


def drop(number, key):
    return lambda content: content["gnd"][number].pop(key)


def replaced(**changes):
    return lambda content: content.update(changes)


@each(("change", "message"), [
    (without("imlist"), "it lacks imlist"),
    (without("gnd"), "it lacks gnd"),
    (replaced(gnd=CONTENT["gnd"][:1]), "qimlist names 2 queries, gnd has 1 entries"),
    (replaced(gnd={"a": 1}), "gnd has no list of entries"),
    (replaced(qimlist=[]), "qimlist is no list of image names"),
    (replaced(imlist=[*IMAGES, "image_009"]), "1 images are in imlist more than once, first 'image_009'"),
    (replaced(imlist=[*IMAGES, 3]), "imlist holds 3, which is no name"),
    (replaced(imlist=[*IMAGES, "../../etc/passwd"]), "imlist holds '../../etc/passwd', which lies outside"),
    (replaced(qimlist=["/etc/passwd", "a"]), "qimlist holds '/etc/passwd', which lies outside"),
    (drop(0, "bbx"), r"query 0 \('tower_1'\) has no bbx"),
    (drop(1, "hard"), r"query 1 \('image_004'\) lacks hard"),
    (replaced(gnd=[CONTENT["gnd"][0], [1]]), r"query 1 \('image_004'\) has no bbx"),
    (entry(0, bbx=[0, 0, 5]), r"bbx of query 0 \('tower_1'\) is \[0, 0, 5\]; it needs four numbers"),
    (entry(0, bbx=[5, 0, 5, 9]), "left < right"),
    (entry(0, bbx=["x" * 10**6] * 1000), r"is \['xxxxxxxxxxxx\.\.\.x.{,600}$"),
    (replaced(imlist=["x" * 10**6]), r"imlist holds 'xxxxxxxxxxxx\.\.\.x.{,200}$"),
    (replaced(imlist=functools.reduce(lambda part, _: (part, part), range(40), "x")), "repeats what it holds"),
    (entry(0, bbx=[0, 0, float("nan"), 9]), "it needs four numbers"),
    (entry(0, bbx="wide"), "it needs four numbers"),
    (entry(1, easy=[30]), r"query 1 \('image_004'\) labels image 30; the database has 30"),
    (entry(1, junk=[-1]), "labels image -1"),
    (entry(0, hard=[1]), r"query 0 \('tower_1'\) labels image 1 twice, as easy and hard"),
    (entry(0, junk=[7, 9, 7]), "labels image 7 twice, as junk and junk"),
    (entry(0, easy=[1.5]), r"'easy' of query 0 \('tower_1'\) is no list of whole numbers"),
    (entry(0, easy=[True]), "no list of whole numbers"),
    (entry(0, easy=[[1], [2, 3]]), "no list of whole numbers"),
    (entry(0, easy=3), "no list of whole numbers"),
    (entry(0, easy=[2**70]), "no list of whole numbers"),
])
def test_what_would_make_a_wrong_number_is_refused_by_name(tmp_path, change, message):
    content = copy.deepcopy(CONTENT)
    change(content)
    with pytest.raises(DataError, match=message) as caught:
        read_ground_truth(save(tmp_path, content))
    assert str(tmp_path / "gnd_mine.pkl") in str(caught.value)


def test_the_original_ground_truth_is_told_from_the_revisited_one(tmp_path):
    content = {**CONTENT, "gnd": [{"bbx": [0, 0, 5, 5], "ok": [1], "junk": []}] * 2}
    with pytest.raises(DataError, match=r"query 0 .* labeled ok and junk: .* original Oxford or Paris"):
        read_ground_truth(save(tmp_path, content))


def test_files_that_are_no_ground_truth_are_refused(tmp_path):
    for content in ([1, 2], None):
        with pytest.raises(DataError, match="it is no dictionary"):
            read_ground_truth(save(tmp_path, content))
    with pytest.raises(DataError, match="is not a file"):
        read_ground_truth(tmp_path / "absent.pkl")
    os.mkfifo(tmp_path / "pipe.pkl")  # reading it would never end
    with pytest.raises(DataError, match="is not a file"):
        read_ground_truth(tmp_path / "pipe.pkl")
    with (tmp_path / "huge.pkl").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(DataError, match="larger than 64 MiB"):
        read_ground_truth(tmp_path / "huge.pkl")


@each("level", [".", "mine", "datasets/mine"])
def test_a_set_is_found_where_the_downloads_put_it(tmp_path, level):
    folder = tmp_path / level
    (folder / "jpg").mkdir(parents=True)
    path = save(folder, CONTENT)
    place = find_ground_truth(tmp_path, "mine")
    assert (place.ground_truth, place.images) == (path, folder / "jpg")


def test_a_set_that_is_not_there_is_named_with_what_is(tmp_path):
    with pytest.raises(DataError, match=r"no ground truth of roxford5k .*datasets/roxford5k/gnd_roxford5k.pkl$"):
        find_ground_truth(tmp_path, "roxford5k")
    with pytest.raises(DataError, match="no ground truth of roxford5k"):
        find_ground_truth(tmp_path / "absent", "roxford5k")
    (tmp_path / "datasets" / "mine").mkdir(parents=True)
    save(tmp_path / "datasets" / "mine", CONTENT)
    with pytest.raises(DataError, match=r"there is gnd_mine\.pkl"):
        find_ground_truth(tmp_path, "rparis6k")
    with pytest.raises(DataError, match=r"has gnd_mine.pkl but no folder jpg"):
        find_ground_truth(tmp_path, "mine")
    for name in ("", "..", "a/b"):
        with pytest.raises(UsageError, match="is no name of a set"):
            find_ground_truth(tmp_path, name)


def test_absent_images_are_counted_and_the_first_named(tmp_path):
    truth = read_ground_truth(save(tmp_path, {**CONTENT, "imlist": [*IMAGES[:-1], "picture.png"]}))
    folder = tmp_path / "jpg"
    folder.mkdir()
    assert len(truth.image_names()) == 31  # 30 of the database and the query that is not in it
    with pytest.raises(DataError, match=r"31 of 31 images are not in .*\n  image_000.jpg\n(.*\n)+  and 11 more$"):
        require_images(truth, folder)
    for name in truth.image_names():
        (folder / name).touch()
    require_images(truth, folder)
    assert (folder / "picture.png").exists()
    (folder / "tower_1.jpg").unlink()
    assert absent_images(truth, folder) == ["tower_1.jpg"]


def test_images_are_found_in_whatever_capitals_their_files_are_written(tmp_path):
    truth = read_ground_truth(save(tmp_path, CONTENT))
    folder = tmp_path / "jpg"
    folder.mkdir()
    for number, name in enumerate(truth.image_names()):
        (folder / (name.upper() if number % 2 else name)).touch()
    assert absent_images(truth, folder) == []
    assert present_names(truth.image_names()[:3], folder) == ["image_000.jpg", "IMAGE_001.JPG", "image_002.jpg"]
    (folder / "Image_001.jpg").touch()
    with pytest.raises(DataError, match=r"has (IMAGE_001.JPG|Image_001.jpg) and .* for image_001.jpg; remove all but"):
        absent_images(truth, folder)
    (folder / "image_001.jpg").touch()
    assert absent_images(truth, folder) == []
    assert present_names(["a/b.jpg", "image_001.jpg"], folder) == [None, "image_001.jpg"]


def test_labels_are_taken_as_the_official_code_has_them(tmp_path):
    raw = as_truths(CONTENT["gnd"], 30)
    read = as_truths(read_ground_truth(save(tmp_path, CONTENT)), 1000)  # distractors follow
    for one, other in zip(raw, read, strict=True):
        assert one.labeled.tolist() == other.labeled.tolist()
    with pytest.raises(DataError, match="query 1 labels image 29; the database has 20"):
        as_truths(CONTENT["gnd"], 20)
    with pytest.raises(DataError, match="29 images were ranked; the database of the ground truth has 30"):
        as_truths(read_ground_truth(save(tmp_path, CONTENT)), 29)
    for wrong in ([], CONTENT):
        with pytest.raises(DataError, match="no list of queries"):
            as_truths(wrong, 30)
