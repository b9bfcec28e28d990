"""Frames in and moving pictures out: order, counts, what is refused, and that nothing is left half written."""

import sys

import av
import numpy as np
import pytest
from cases import each
from PIL import Image

from patchssl.report.figures import videofile
from patchssl.report.figures.videofile import check_video_path, open_frames, write_video
from patchssl.runtime.errors import DataError, UsageError


def frame(number, height=48, width=64):
    """A smooth picture that moves to the right by two pixels a frame."""
    x, y = np.meshgrid(np.arange(width) - 2 * number, np.arange(height))
    wave = 127 + 120 * np.sin(x / 9)
    return np.stack([wave, 255 - wave, 4.0 * y], axis=-1).round().astype(np.uint8)


def made(path, count=20, rate=12.5):
    with write_video(path, rate) as add:
        for number in range(count):
            add(frame(number))
    return path


def taken(source, every=1):
    with open_frames(source, every) as (frames, total, rate):
        return list(frames), total, rate


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return made(tmp_path_factory.mktemp("video") / "v.mp4")


def test_a_video_holds_the_frames_it_was_made_of(video):
    frames, total, rate = taken(video)
    assert (len(frames), total, rate) == (20, 20, 12.5)
    assert [name for name, _ in frames[:2]] == ["frame 0", "frame 1"]
    for number in (0, 7, 19):
        assert np.abs(frames[number][1].astype(int) - frame(number)).mean() < 4
    thinned, total, rate = taken(video, every=3)
    assert (len(thinned), total, rate) == (7, 7, pytest.approx(12.5 / 3))
    assert np.array_equal(thinned[2][1], frames[6][1]) and thinned[2][0] == "frame 6"


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_pillow_reads_back_every_frame_of_an_animation(tmp_path, suffix):
    with Image.open(made(tmp_path / f"a{suffix}", count=6, rate=20)) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (6, (64, 48), 0)
        for number in range(6):
            image.seek(number)
            shown = np.asarray(image.convert("RGB")).astype(int)
            assert image.info["duration"] == 50
            assert np.abs(shown - frame(number)).mean() < 12
            assert np.abs(shown - frame(number)).mean() < np.abs(shown - frame(number + 3)).mean()


@each("suffix", [".mp4", ".gif", ".webp"])
def test_the_same_frames_have_the_same_bytes(tmp_path, suffix):
    first, second = (made(tmp_path / f"{name}{suffix}", count=5).read_bytes() for name in "ab")
    assert first == second


def test_frames_of_a_folder_come_by_their_numbers_and_are_read_one_by_one(tmp_path):
    for number in (10, 9, 1):
        Image.fromarray(frame(number)).save(tmp_path / f"f{number}.png")
    (tmp_path / "f11.png").write_text("damaged")
    with open_frames(tmp_path) as (frames, total, rate):
        assert (total, rate) == (4, 10.0)
        found = [next(frames) for _ in range(3)]
        assert [name for name, _ in found] == ["f1.png", "f9.png", "f10.png"]
        assert np.array_equal(found[2][1], frame(10))
        with pytest.raises(DataError, match=r"f11\.png cannot be read"):
            next(frames)
    assert [name for name, _ in taken(tmp_path, every=2)[0]] == ["f1.png", "f10.png"]


NOISE = np.random.default_rng(0).bytes(2**16)
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"


@each(("content", "sentence"), [
    (lambda data, _: b"", "cannot be read as a video"),
    (lambda data, _: b"no video " * 99, "cannot be read as a video: Invalid data"),
    (lambda data, _: data[: len(data) * 2 // 3], "cannot be read as a video: Invalid|of 20: it is damaged"),
    (lambda data, _: data[:300], "holds no moving picture|cannot be read"),
    (lambda data, _: data[: len(data) // 4] + NOISE[: len(data) // 2] + data[-len(data) // 4 :], "cannot be|damaged"),
    (lambda data, path: PLAYLIST.format(path).encode(), "cannot be read as a video"),
    (lambda data, path: f"ffconcat version 1.0\nfile {path}\n".encode(), "cannot be read as a video"),
], ids=["empty", "text", "truncated", "head", "noise", "playlist", "concat"])
def test_a_broken_or_hostile_video_is_a_sentence(tmp_path, video, content, sentence):
    path = tmp_path / "bad.mp4"
    path.write_bytes(content(video.read_bytes(), video))
    with pytest.raises(DataError, match=sentence) as caught:
        taken(path)
    assert str(path) in str(caught.value)


def test_sound_without_a_picture_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="holds no moving picture"):
        taken(path)


def test_frames_that_are_too_large_are_not_decoded(video, monkeypatch):
    monkeypatch.setattr(videofile, "MOST_PIXELS", 1000)
    with pytest.raises(DataError, match="64 x 48 pixels, more than 1,000"):
        taken(video)


def test_what_is_not_there_or_empty_is_said(tmp_path):
    with pytest.raises(DataError, match="neither a folder of images nor a video"):
        taken(tmp_path / "missing.mp4")
    with pytest.raises(DataError, match="holds no images"):
        taken(tmp_path)


def test_what_cannot_be_written_is_said_before_any_work(tmp_path):
    with pytest.raises(UsageError, match=r"'avi'.*mp4, gif, webp"):
        check_video_path(tmp_path / "a.avi")
    (tmp_path / "a.gif").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        check_video_path(tmp_path / "a.gif")


def test_without_the_extra_the_sentence_names_it_and_folders_and_gifs_still_work(tmp_path, video, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"patchssl\[video\].*folder of images"):
        taken(video)
    with pytest.raises(UsageError, match=r"patchssl\[video\].*\.gif or \.webp"):
        check_video_path(tmp_path / "a.mp4")
    Image.fromarray(frame(0)).save(tmp_path / "0.png")
    assert len(taken(tmp_path)[0]) == 1
    assert made(tmp_path / "a.gif", count=2).is_file()


@each("suffix", [".mp4", ".gif", ".webp"])
@each(("error", "count"), [(KeyboardInterrupt, 0), (KeyboardInterrupt, 3), (DataError, 3)])
def test_after_an_error_nothing_is_half_written_and_the_earlier_file_stays(tmp_path, suffix, error, count):
    out = tmp_path / f"a{suffix}"
    out.write_bytes(b"earlier")
    with pytest.raises(error), write_video(out, 10) as add:
        for number in range(count):
            add(frame(number))
        raise error("stop")
    assert [path.name for path in tmp_path.iterdir()] == [out.name] and out.read_bytes() == b"earlier"


def test_animations_hold_no_more_frames_than_memory_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(videofile, "MOST_HELD", 4 * frame(0).nbytes)
    with pytest.raises(UsageError, match=r"a\.webp .* 4 of them .* \.mp4 file, or take fewer frames with --every"):
        made(tmp_path / "a.webp")
    assert made(tmp_path / "a.gif", count=12).is_file()  # a byte a pixel
    assert made(tmp_path / "a.mp4").is_file()


def test_a_frame_that_grows_on_the_way_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    """The size in a container's head binds nobody: the decoder itself has to know the limit."""
    parts = []
    for size in ((48, 64), (480, 640)):
        path = tmp_path / f"{size[0]}.ts"
        with av.open(str(path), "w", format="mpegts") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for number in range(4):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(number, *size), format="rgb24")))
            container.mux(stream.encode())
        parts.append(path.read_bytes())
    (tmp_path / "grows.ts").write_bytes(b"".join(parts))
    sizes = {pixels.shape[:2] for _, pixels in taken(tmp_path / "grows.ts")[0]}
    assert sizes == {(48, 64), (480, 640)}
    monkeypatch.setattr(videofile, "MOST_PIXELS", 100_000)
    monkeypatch.setattr(videofile, "_check_pixels", lambda path, width, height: None)
    with pytest.raises(DataError):
        taken(tmp_path / "grows.ts")


@each("suffix", [".mp4", ".gif", ".webp"])
@each("rate", [1e-9, 1e9])
def test_a_rate_that_no_format_can_say_is_one_that_it_can(tmp_path, suffix, rate):
    assert made(tmp_path / f"v{suffix}", count=2, rate=rate).stat().st_size
