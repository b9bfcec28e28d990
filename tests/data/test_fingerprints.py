"""What sets of files are known by: content counts, wherever it lies and however it is packed, and old formulas stay."""

import hashlib
import logging
import os
import zlib
from io import BytesIO

import numpy as np
import pytest
from cases import each
from packing import pack, unpack
from PIL import Image

from patchssl.data import fingerprints
from patchssl.data.fingerprints import choose_content, load_numbers, store_numbers
from patchssl.data.open import open_images


def noise(seed, extension):
    """A file of 9 x 7 random pixels, whose size does not depend on them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, {"bmp": "BMP", "ppm": "PPM", "tif": "TIFF"}[extension])
    return file.getvalue()


def made(place, kind, contents):
    """A set of `contents` by name, of one kind."""
    if kind in ("zip", "tar"):
        return pack(place / f"set.{kind}", contents)
    unpack(place, contents)
    if kind == "list":
        (place / "all.txt").write_text("".join(f"{name}\t{name[0]}\n" for name in contents))
        return place / "all.txt"
    return place


def contents(seed=0, extension="bmp"):
    return {f"{'ab'[number % 2]}/{number}.{extension}": noise(seed + number, extension) for number in range(6)}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "list"])
@each("extension", ["bmp", "ppm", "tif"])
def test_images_replaced_by_noise_of_equal_size_are_other_images(tmp_path, kind, extension):
    clean = contents(0, extension)
    one = clean | {f"b/3.{extension}": noise(99, extension)}
    assert {len(content) for content in {**clean, **one}.values()} == {len(next(iter(clean.values())))}
    place = made(tmp_path / "set", kind, clean)
    times = {file: file.stat() for file in tmp_path.rglob("*") if file.is_file()}
    before = open_images(place)
    known, first = before.known, before.first_fingerprint
    assert known.content == "all 6 files"
    made(tmp_path / "set", kind, one)
    for file, then in times.items():  # a copy that keeps times
        os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    after = open_images(place)
    assert after.known.fingerprint != known.fingerprint and after.known.key != known.key
    assert after.first_fingerprint == first  # names and sizes alone do not tell
    copied = open_images(made(tmp_path / "copy", kind, clean))
    assert copied.known == known


def test_a_folder_a_zip_and_a_tar_of_one_content_are_one_set(tmp_path):
    found = {open_images(made(tmp_path / kind, kind, contents())).fingerprint for kind in ("folder", "zip", "tar")}
    assert len(found) == 1


def test_the_first_formula_is_what_older_versions_wrote(tmp_path):
    images = open_images(made(tmp_path, "folder", contents()))
    size = len(noise(0, "bmp"))
    lines = "".join(f"{name}\0{size}\n" for name in sorted(contents()))
    assert images.first_fingerprint == hashlib.sha256(f"files 6 truncated=False\n{lines}".encode()).hexdigest()


def test_the_second_formula_by_hand(tmp_path):
    images = open_images(made(tmp_path, "folder", contents()))
    names, size = sorted(contents()), len(noise(0, "bmp"))
    text = "files version=2 6 truncated=False 6\n" + "".join(f"{name}\0{size}\n" for name in names)
    sums = b"".join(zlib.crc32(contents()[name]).to_bytes(8, "little") for name in names)
    assert images.fingerprint == hashlib.sha256(text.encode() + sums).hexdigest()


# sets too large to be read whole

@pytest.fixture
def sampled(monkeypatch):
    monkeypatch.setattr(fingerprints, "MOST_FILES", 5)
    monkeypatch.setattr(fingerprints, "SAMPLE", 2)


def unsampled(names):
    chosen = {names[index] for index in choose_content(names, np.full(len(names), 500)).tolist()}
    return next(name for name in names if name not in chosen)


@each("kind", ["folder", "zip", "tar"])
def test_of_a_large_set_a_sample_counts_and_the_key_of_caches_knows_every_file(tmp_path, kind, sampled):
    clean = contents()
    place = made(tmp_path / "set", kind, clean)
    known = open_images(place).known
    assert known.content == "a sample of 2 of 6 files"
    assert open_images(place).known == known  # nothing happened
    hidden = unsampled(sorted(clean))
    made(tmp_path / "set", kind, clean | {hidden: noise(99, "bmp")})
    after = open_images(place).known
    assert after.fingerprint == known.fingerprint and after.key != known.key
    everything = {name: noise(number + 50, "bmp") for number, name in enumerate(clean)}
    made(tmp_path / "set", kind, everything)
    assert open_images(place).known.fingerprint != known.fingerprint


def test_of_a_large_set_a_copy_that_keeps_the_modification_time_is_seen(tmp_path, sampled):
    clean = contents()
    made(tmp_path, "folder", clean)
    known = open_images(tmp_path).known
    file = tmp_path / unsampled(sorted(clean))
    then = file.stat()
    file.write_bytes(noise(99, "bmp"))
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert open_images(tmp_path).known.key != known.key


def test_the_sample_is_bounded_by_bytes_and_never_empty(monkeypatch):
    names = [f"{number}.bmp" for number in range(100)]
    assert len(choose_content(names, np.full(100, 2**20))) == 100
    assert len(choose_content(names, np.full(100, 2**27))) == 8
    assert len(choose_content(names, np.full(100, 2**31))) == 1
    small = choose_content(names, np.full(100, 2**26)).tolist()
    assert set(choose_content(names, np.full(100, 2**27)).tolist()) < set(small)
    monkeypatch.setattr(fingerprints, "MOST_FILES", 10)
    monkeypatch.setattr(fingerprints, "SAMPLE", 7)
    assert len(choose_content(names, np.full(100, 10))) == 7


def test_what_cannot_be_found_or_is_no_file_counts_and_is_not_read(tmp_path):
    made(tmp_path, "folder", contents())
    before = open_images(tmp_path).fingerprint
    os.mkfifo(tmp_path / "a/pipe.bmp")  # reading it would never end
    (tmp_path / "a/gone.bmp").symlink_to(tmp_path / "nowhere")
    with_both = open_images(tmp_path).fingerprint
    assert len({before, with_both}) == 2


# what is remembered

@pytest.fixture
def remembering(monkeypatch, tmp_path):
    """Counts the files that are read; all is worth keeping, and clocks are fine."""
    read = []
    real = fingerprints.file_sum
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "_WORTH_KEEPING", (0, 0))
    monkeypatch.setattr(fingerprints, "RACY", 0)
    monkeypatch.setattr(fingerprints, "file_sum", lambda *about: read.append(about[0]) or real(*about))
    return read


def test_checksums_are_remembered_until_a_file_changes(tmp_path, remembering):
    made(tmp_path / "set", "folder", contents())
    first = open_images(tmp_path / "set").fingerprint
    assert open_images(tmp_path / "set").fingerprint == first
    assert len(remembering) == 6
    (tmp_path / "set/a/2.bmp").write_bytes(noise(99, "bmp"))
    assert open_images(tmp_path / "set").fingerprint != first
    assert remembering[6:] == [f"{tmp_path}/set/a/2.bmp"]


def test_what_changed_just_now_is_not_remembered(tmp_path, remembering, monkeypatch):
    monkeypatch.setattr(fingerprints, "RACY", 10**12)
    made(tmp_path / "set", "folder", contents())
    for _ in range(2):
        open_images(tmp_path / "set").known  # noqa: B018
    assert len(remembering) == 12


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:-1], lambda content: bytes(len(content)),
    lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:], lambda content: content * 1000])
def test_damaged_memory_is_not_used(tmp_path, remembering, damage, caplog):
    made(tmp_path / "set", "folder", contents())
    first = open_images(tmp_path / "set").fingerprint
    [kept] = (tmp_path / "cache/content").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert open_images(tmp_path / "set").fingerprint == first
    assert len(remembering) == 12


def test_numbers_come_back_only_as_they_were_kept(tmp_path, caplog):
    store_numbers(tmp_path / "x", np.arange(5))
    assert load_numbers(tmp_path / "x", 5).tolist() == [0, 1, 2, 3, 4]
    assert load_numbers(tmp_path / "x", 4) is None and load_numbers(tmp_path / "y", 5) is None
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        store_numbers(tmp_path / "file/x", np.arange(5))
    assert "not remembered" in caplog.text
