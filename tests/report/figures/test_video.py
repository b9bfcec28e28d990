"""Videos of attention: every frame shows the image, its attention and its largest mass, read back from the file."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from patchssl.report.figures.video import draw_attention_video
from patchssl.report.figures.videofile import open_frames
from patchssl.report.plots.attention import largest_mass
from patchssl.report.plots.frames import draw_frame, make_sheet
from patchssl.runtime.console import Console
from patchssl.runtime.errors import DataError

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1&embed_dim=24"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four frames of 40 x 60 pixels, called so that their order is that of their numbers."""
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    for number in (8, 9, 10, 11):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def draw(source, out, **options):
    return draw_attention_video(SMALL, source, out, size=24, device="cpu", console=Console(quiet=True), **options)


@pytest.mark.parametrize("size", [(24, 36), (37, 20)])
def test_the_panels_of_a_frame_show_what_they_say(size):
    rng = np.random.default_rng(0)
    image = np.full((*size, 3), 90, np.uint8)
    grid = -(-size[0] // 8), -(-size[1] // 8)
    attention = rng.random((2, *grid)) ** 4 / 9
    sheet = make_sheet(image.shape, "a $title$", 0.6)
    shown = draw_frame(sheet, image, attention, 8, 0.6)
    assert shown.shape == sheet.canvas.shape and shown.shape[0] % 2 == shown.shape[1] % 2 == 0
    rows, columns = sheet.size
    plain, heat, held = (shown[top : top + rows, left : left + columns] for top, left in sheet.panels)
    assert (plain == 90).all()
    mean, mask = attention.mean(0), largest_mass(attention.mean(0), 0.6)
    for row in range(grid[0]):
        for column in range(grid[1]):
            middle = [int((at + 0.25) * 8 * panel / side) for at, panel, side in
                      zip((row, column), (rows, columns), size, strict=True)]
            place = np.clip(np.log2(mean[row, column] * mean.size * 4) / 6, 0, 1)  # of 1/4 to 16, by powers of two
            color = np.array(colormaps["viridis"](place)[:3]) * 255
            assert heat[tuple(middle)] == pytest.approx(0.35 * 90 + 0.65 * color, abs=4)
            assert (held[tuple(middle)] == (90, 90, 90)).all() == mask[row, column]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_every_frame_is_in_the_file(folder, tmp_path, suffix):
    out = tmp_path / f"a{suffix}"
    assert draw(folder, out, rate=5) == 4
    if suffix == ".mp4":
        with open_frames(out) as (frames, total, rate):
            assert (len(list(frames)), total, rate) == (4, 4, 5)
        assert draw(out, tmp_path / "again.gif", every=2) == 2  # a video of a video
    else:
        with Image.open(out) as image:
            image.load()
            assert (image.n_frames, image.info["duration"]) == (4, 200)


@pytest.mark.slow
def test_frames_of_another_size_are_named_and_nothing_is_written(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (60, 41)).save(tmp_path / "100.png")
    with pytest.raises(DataError, match=r"100\.png of .* has 41 x 60 pixels and the first frame 40 x 60"):
        draw(tmp_path, tmp_path / "out" / "a.gif")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_says_what_it_does(patchssl, folder, tmp_path):
    out = tmp_path / "a.gif"
    ran = patchssl("plot", "attention-video", SMALL, folder, "--size", "24", "--every", "2", "--out", out)
    assert (ran.code, ran.out.strip()) == (0, str(out)), ran.err
    assert "frames 2 of 2" in ran.err and "padded" in ran.err
    ran = patchssl("plot", "attention-video", SMALL, folder, "--out", tmp_path / "a.avi")
    assert ran.code == 2 and "mp4, gif, webp" in ran.err


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    for number in range(3000):
        image.save(frames / f"{number}.ppm")
    out = tmp_path / "out"
    run = subprocess.Popen([sys.executable, "-m", "patchssl", "plot", "attention-video", SMALL, frames, "--size", "64",
                            "--out", out / "a.mp4"], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    end = time.monotonic() + 120
    while not (out.is_dir() and any(path.stat().st_size for path in out.iterdir())) and time.monotonic() < end:
        time.sleep(0.05)
    assert run.poll() is None, run.stderr.read()
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    assert run.returncode not in (0, None)
    assert list(out.iterdir()) == []
