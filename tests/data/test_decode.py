import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from cases import each
from PIL import Image, ImageFile, ImageOps, features

from patchssl.data.decode import EXTENSIONS, decode_bytes, decode_image, left_out, list_images, strict_pillow
from patchssl.data.open import open_images
from patchssl.runtime.errors import DataError, Interrupted, UnreadableImage, UsageError


def picture(height: int = 6, width: int = 9, seed: int = 0) -> np.ndarray:
    """Random RGB pixels: no two of them alike, so that a wrong turn cannot pass."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int = 64, width: int = 96) -> Image.Image:
    """A picture that JPEG keeps almost as it is."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 2, y * 3, x + y], axis=-1).astype(np.uint8))


@each("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_back_the_pixels_that_were_saved(kind, tmp_path):
    path = tmp_path / "a.img"
    path.write_bytes(encoded(Image.fromarray(picture()), kind))
    pixels = decode_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, picture())


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_stay_near_the_pixels_that_were_saved(kind):
    pixels = decode_bytes(encoded(smooth(), kind, quality=95), "a")
    assert np.abs(pixels.astype(int) - np.asarray(smooth())).mean() < 3


@each("orientation", range(1, 9))
@each("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_undone(kind, orientation):
    """EXIF says how the stored rows and columns lie: 6 = row 0 is the right side, column 0 is the top."""
    upright = picture()
    turned = upright.swapaxes(0, 1)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: turned,
        6: turned[::-1],
        7: turned[::-1, ::-1],
        8: turned[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(
        Image.fromarray(np.ascontiguousarray(stored)),
        kind,
        exif=exif,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    np.testing.assert_array_equal(decode_bytes(data, "a"), upright)
    np.testing.assert_array_equal(ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB"), upright)


def test_exif_orientation_of_a_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6  # taken upright by a camera held sideways: turn the pixels clockwise
    plain = decode_bytes(encoded(smooth(), "JPEG"), "a")
    turned = decode_bytes(encoded(smooth(), "JPEG", exif=exif), "a")
    assert turned.shape == (96, 64, 3)
    np.testing.assert_array_equal(turned, plain.swapaxes(0, 1)[:, ::-1])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@each("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_does_not_spoil_the_pixels(exif):
    plain = decode_bytes(encoded(smooth(), "JPEG"), "a")
    np.testing.assert_array_equal(decode_bytes(encoded(smooth(), "JPEG", exif=exif), "a"), plain)


@each("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_not_clipped(kind):
    gray = np.array([[0, 128, 129, 257, 32768, 65279, 65406, 65535]], dtype=np.uint16)
    pixels = decode_bytes(encoded(Image.fromarray(gray), kind), "a")
    # value / 257, rounded by hand: 0.498 -> 0, 0.502 -> 1, 127.502 -> 128, 254.004 -> 254, 254.498 -> 254
    expected = np.array([[0, 0, 1, 1, 128, 254, 254, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(pixels, np.stack([expected] * 3, axis=-1))


def test_16_bit_gray_with_an_orientation():
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.fromarray(np.array([[0, 257], [514, 771]], dtype=np.uint16))
    pixels = decode_bytes(encoded(image, "PNG", exif=exif), "a")
    np.testing.assert_array_equal(pixels[..., 0], [[3, 2], [1, 0]])


def tiff(entries: list[tuple[int, int, int]], pixels: bytes) -> bytes:
    """A little-endian TIFF of one strip, `entries` being (tag, type, value)."""
    entries = sorted([*entries, (273, 4, 8), (279, 4, len(pixels))])
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory + b"\0\0\0\0"


def test_12_bit_gray_is_scaled_from_its_own_white():
    # two pixels in three bytes: 0xFFF and 0x800 (2048 / 4095 * 255 = 127.53)
    entries = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (277, 3, 1), (278, 3, 1)]
    pixels = decode_bytes(tiff(entries, b"\xff\xf8\x00"), "a")
    np.testing.assert_array_equal(pixels[..., 0], [[255, 128]])


def test_16_bit_color_keeps_the_high_byte():
    rows = b"\0" + struct.pack(">3H", 0x12FF, 0x8001, 0xFFFF)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(decode_bytes(data, "a"), [[[0x12, 0x80, 0xFF]]])


def test_gray_and_1_bit_repeat_in_three_channels():
    gray = np.array([[0, 100, 255]], dtype=np.uint8)
    expected = np.stack([gray] * 3, axis=-1)
    np.testing.assert_array_equal(decode_bytes(encoded(Image.fromarray(gray), "PNG"), "a"), expected)
    with_alpha = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(gray[:, ::-1].copy())])
    np.testing.assert_array_equal(decode_bytes(encoded(with_alpha, "PNG"), "a"), expected)
    bits = Image.fromarray(np.array([[True, False, True]]))
    assert bits.mode == "1"
    np.testing.assert_array_equal(decode_bytes(encoded(bits, "PNG"), "a")[..., 1], [[255, 0, 255]])


def palette_image() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return image


@each("options", [{}, {"transparency": 1}, {"transparency": b"\x00\x80\xff"}])
@each("kind", ["PNG", "GIF"])
@pytest.mark.filterwarnings("error")
def test_palette_gives_its_colors_and_drops_transparency(kind, options):
    if kind == "GIF" and isinstance(options.get("transparency"), bytes):
        options = {"transparency": 2}  # a GIF has one transparent color at most
    data = encoded(palette_image(), kind, **options)
    np.testing.assert_array_equal(decode_bytes(data, "a"), [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]])


def test_alpha_is_dropped_not_composited():
    rgba = np.dstack([picture(), np.zeros((6, 9), dtype=np.uint8)])
    np.testing.assert_array_equal(decode_bytes(encoded(Image.fromarray(rgba), "PNG"), "a"), picture())


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_becomes_rgb(kind):
    ink = Image.fromarray(np.tile(np.array([255, 0, 0, 0], dtype=np.uint8), (16, 16, 1)), mode="CMYK")
    pixels = decode_bytes(encoded(ink, kind), "a")
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - [0, 255, 255]).max() <= 2  # cyan ink leaves green and blue


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((4, 4), value, dtype=np.uint8)) for value in (50, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_bytes(data, "a") == 50).all()


@pytest.mark.parametrize(
    ("values", "words"), [(np.float32, "floating-point numbers"), (np.int32, "32-bit integers")]
)
def test_pixels_without_an_agreed_range_are_refused(values, words):
    data = encoded(Image.fromarray(np.ones((3, 3), dtype=values)), "TIFF")
    with pytest.raises(UnreadableImage, match=f"a.tif cannot be read.*{words}.*8 or 16 bits"):
        decode_bytes(data, "a.tif")


def test_text_called_jpg_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("<!DOCTYPE html>")
    with pytest.raises(UnreadableImage, match="no known image format") as refused:
        decode_image(tmp_path / "a.jpg")
    assert refused.value.name == str(tmp_path / "a.jpg")
    assert "<!DOCTYPE ht" in refused.value.reason


def test_empty_missing_and_folder(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name, reason in [("empty.png", "empty"), ("none.png", "No such file"), ("folder.png", "directory")]:
        with pytest.raises(UnreadableImage, match=reason):
            decode_image(tmp_path / name)


def test_postscript_never_reaches_its_interpreter(monkeypatch):
    def interpret(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", interpret)
    program = encoded(Image.new("RGB", (4, 4)), "EPS")
    assert program.startswith(b"%!PS")
    with pytest.raises(UnreadableImage, match="no known image format"):
        decode_bytes(program, "a.jpg")


def test_decompression_bomb_is_refused_before_it_is_unpacked():
    header = b"P5 20000 20000 255\n"  # claims 400 million pixels
    with pytest.raises(UnreadableImage, match=r"400000000 pixels.*decompression bomb"):
        decode_bytes(header, "a.pgm")


# cut points in percent: within the compressed data of each format
TRUNCATED = [("JPEG", 50), ("JPEG", 95), ("PNG", 50), ("PNG", 90), ("BMP", 60), ("PPM", 30), ("TIFF", 80)]


def cut(kind: str, percent: int, **options: object) -> bytes:
    data = encoded(Image.fromarray(picture(64, 96)), kind, **options)
    return data[: len(data) * percent // 100]


@each(("kind", "percent"), TRUNCATED)
def test_truncated_files_are_refused(kind, percent):
    with pytest.raises(UnreadableImage):
        decode_bytes(cut(kind, percent), "a")


@each(("kind", "percent"), [case for case in TRUNCATED if case[0] != "TIFF"])
@each("progressive", [False, True])
def test_allowed_truncated_files_equal_what_pillow_loads_with_its_switch(
    kind, percent, progressive, monkeypatch
):
    data = cut(kind, percent, **({"progressive": progressive} if kind == "JPEG" else {}))
    pixels = decode_bytes(data, "a", allow_truncated=True)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    np.testing.assert_array_equal(pixels, Image.open(BytesIO(data)).convert("RGB"))


def test_allowing_truncated_files_leaves_whole_ones_alone():
    for kind in ("JPEG", "PNG", "TIFF"):
        data = encoded(smooth(), kind)
        np.testing.assert_array_equal(decode_bytes(data, "a", allow_truncated=True), decode_bytes(data, "a"))


def test_truncation_counts_even_where_another_library_set_pillows_switch(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UnreadableImage, match="truncated"):
        decode_bytes(cut("JPEG", 50), "a")
    with strict_pillow():
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # theirs again


def test_nothing_is_invented_for_a_file_without_pixels():
    data = encoded(Image.fromarray(picture()), "PNG")[:20]
    with pytest.raises(UnreadableImage):
        decode_bytes(data, "a", allow_truncated=True)


@pytest.mark.parametrize("error", [Interrupted("stopped"), MemoryError()])
def test_an_interruption_is_not_the_images_fault(error, monkeypatch):
    def load(self: object) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(type(error)):
        decode_bytes(encoded(Image.fromarray(picture()), "PNG"), "a")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_list_images_at_any_depth_in_order_with_the_others_counted(tmp_path):
    touch(tmp_path, "b/c/2.JPEG", "b/1.png", "a.webp", "a.b/3.Tif", "x.heic", "b/y.HEIC", "README", "z.txt")
    listing = list_images(tmp_path)
    assert listing.names == ["a.b/3.Tif", "a.webp", "b/1.png", "b/c/2.JPEG"]
    assert listing.others == {".heic": 2, ".txt": 1, "no extension": 1}


def test_every_extension_is_known_in_any_case(tmp_path):
    touch(tmp_path, *(f"{i}{extension.upper()}" for i, extension in enumerate(EXTENSIONS)))
    assert len(list_images(tmp_path).names) == len(EXTENSIONS) >= 14


def test_hidden_files_and_folders_are_left_out(tmp_path):
    touch(tmp_path, "._a.jpg", ".thumbnails/b.jpg", ".DS_Store", "c.jpg")
    assert list_images(tmp_path) == (["c.jpg"], {})


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "elsewhere/1.jpg", "set/own/2.jpg")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/own/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/own/again").symlink_to(tmp_path / "set/own")
    (tmp_path / "set/3.jpg").symlink_to(tmp_path / "elsewhere/1.jpg")
    assert list_images(tmp_path / "set").names == ["3.jpg", "linked/1.jpg", "own/2.jpg"]


def test_links_to_nowhere_are_listed_so_that_reading_them_fails(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    assert list_images(tmp_path).names == ["gone.jpg", "self.jpg"]
    for name in ("gone.jpg", "self.jpg"):
        with pytest.raises(UnreadableImage):
            decode_image(tmp_path / name)


def test_a_folder_that_cannot_be_entered_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "open/1.jpg", "closed/2.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the suite may run as root, whom no mode keeps out
    with pytest.raises(DataError, match=r"closed cannot be listed: Permission denied"):
        list_images(tmp_path)


@each(("format", "feature", "extension"), [("AVIF", "avif", ".avif"), ("JPEG2000", "jpg_2000", ".jp2")])
def test_formats_that_some_pillows_read(format, feature, extension, tmp_path):
    if feature not in features.get_supported():
        pytest.skip(f"this Pillow has no {feature}")
    color = np.full((16, 24, 3), [200, 10, 30], dtype=np.uint8)
    (tmp_path / f"a{extension.upper()}").write_bytes(encoded(Image.fromarray(color), format))
    (name,) = list_images(tmp_path).names
    assert np.abs(decode_image(tmp_path / name).astype(int) - color).max() <= 3


def test_what_is_left_out_is_counted_with_what_would_read_it(tmp_path):
    touch(tmp_path, "a.heic", "b.HEIC", "c.jxl", "d.txt")
    others = list_images(tmp_path).others
    if not {".heic", ".jxl"} & EXTENSIONS:
        assert left_out(others) == ("4 files with other extensions (.heic 2, .jxl 1, .txt 1); .heic needs pip install "
                                    "pillow-heif; .jxl needs pip install pillow-jxl-plugin")


def deep(values, format="PNG"):
    return encoded(Image.fromarray(np.array(values, dtype=np.uint16)), format)


@each(("format", "name"), [("PNG", "a.png"), ("TIFF", "a.TIF")])
def test_12_bits_in_16_are_read_by_the_range_of_the_file_and_said(format, name, tmp_path):
    ramp = np.arange(4096).reshape(64, 64)
    for index in range(3):
        (tmp_path / f"{index}{name}").write_bytes(deep(ramp, format))
    images = open_images(tmp_path)
    assert len(np.unique(images.pixels(0))) == 17
    assert images.describe().endswith(
        "without labels; the brightest value in 3 of the 16-bit images is 4,095 of 65,535: if they hold 12 bits, they "
        "are read as 17 of 256 levels; multiply their values by 16 and save them again")
    for index in range(3):  # as the sentence says
        (tmp_path / f"{index}{name}").write_bytes(deep(ramp * 16, format))
    images = open_images(tmp_path)
    assert (images.note, len(np.unique(images.pixels(0)))) == ("", 256)


def test_12_bits_in_color_of_16_are_said_and_few_bright_images_are_enough_to_say_nothing(tmp_path):
    def color(*values):
        rows = b"\0" + struct.pack(">3H", *values)
        header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body
                                            + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)

    (tmp_path / "a.png").write_bytes(color(0x0FFF, 0x0100, 0x0200))
    assert "if they hold 12 bits, they are read as 16 of 256 levels" in open_images(tmp_path).note
    (tmp_path / "b.png").write_bytes(color(0x0FFF, 0xF000, 0x0200))
    assert open_images(tmp_path).note == ""
    (tmp_path / "b.png").write_bytes(b"broken")  # said by what reads it
    assert "if they hold 12 bits" in open_images(tmp_path).note


def test_pillows_limit_of_pixels_is_named_and_can_be_raised(monkeypatch):
    content = encoded(Image.new("L", (60, 50)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice that
    said = r"\(3000 pixels\) exceeds limit of 2000 pixels, .*PATCHSSL_MAX_PIXELS=N in the env"
    with pytest.raises(UnreadableImage, match=said):
        decode_bytes(content, "a")
    monkeypatch.setenv("PATCHSSL_MAX_PIXELS", "6000")
    assert decode_bytes(content, "a").shape == (50, 60, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setenv("PATCHSSL_MAX_PIXELS", "many")
    with pytest.raises(UsageError, match="PATCHSSL_MAX_PIXELS is 'many'"):
        decode_bytes(content, "a")
