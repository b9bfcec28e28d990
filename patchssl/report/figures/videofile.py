"""Moving pictures: frames of a folder or of a video file one by one, and written as .mp4, .gif or .webp.

Video files are read, and .mp4 written, by PyAV (the extra `video`), which nothing else names. A video is hostile
until decoded: it is read through an open file, as one of a few formats, and may not name others to open.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from patchssl.data.decode import decode_image, list_images
from patchssl.report.plots.canvas import Pixels
from patchssl.runtime.errors import DataError, PatchSSLError, UsageError
from patchssl.runtime.files import whole_file

SUFFIXES = (".mp4", ".gif", ".webp")
FOLDER_RATE = 10.0  # frames per second of a folder of images
LEAST_RATE, MOST_RATE = 0.01, 1000.0  # that formats can say; a video that was read may claim anything
MOST_PIXELS = 2**26  # of a frame: 8192 x 8192
MOST_HELD = 2**29  # bytes of frames that an animated image may hold in memory: 512 MiB
# of ffmpeg's names: MP4 and QuickTime, Matroska and WebM, AVI, GIF, MPEG; not playlists, which name other files
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg,flv"
_COMPLETE = 0.9  # of the frames that a video says it has: editors leave some out on purpose
Add = Callable[[Pixels], None]


class Frames(NamedTuple):
    """Frames (name, pixels) in their order, about how many, and how many are shown per second."""

    frames: Iterator[tuple[str, Pixels]]
    total: int | None
    rate: float


@contextmanager
def open_frames(source: Path, every: int = 1) -> Iterator[Frames]:
    """Every `every`-th frame of `source`: a folder of images, in the order of the numbers in their names, or a video.

    One frame is in memory at a time. DataError for what cannot be read, then or while frames are taken; UsageError
    for a video without PyAV.
    """
    if source.is_dir():
        names = sorted(list_images(source).names, key=_by_number)[::every]
        if not names:
            raise DataError(f"{source} holds no images to take as frames")
        yield Frames(((name, decode_image(source / name)) for name in names), len(names), FOLDER_RATE)
    elif source.is_file():
        yield from _open_video(source, every)
    else:
        raise DataError(f"{source} is neither a folder of images nor a video file")


def check_video_path(out: Path) -> None:
    """Before any work: UsageError where `out` is no moving picture that can be written here."""
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{out.name} asks for a video of type '{suffix.removeprefix('.')}'; choose one of: "
                         f"{', '.join(name.removeprefix('.') for name in SUFFIXES)}")
    if suffix == ".mp4":
        _pyav(f"writing {out.name}", "or name a .gif or .webp file")
    if out.is_dir():
        raise DataError(f"{out} is a folder; name a file for the video")


@contextmanager
def write_video(out: Path, rate: float) -> Iterator[Add]:
    """A function that adds a frame (H, W, 3) uint8, all of one even size, to `out`.

    It shows `rate` frames per second, or the nearest that formats can say. The file appears when all went well; after
    an error or Ctrl-C there is none, and an earlier one stays. UsageError for more frames than an animated image may
    hold.
    """
    check_video_path(out)
    write = _write_mp4 if out.suffix.lower() == ".mp4" else _write_animation
    with whole_file(out, "video") as partial, write(partial, out, min(max(rate, LEAST_RATE), MOST_RATE)) as add:
        yield add


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """What frame2.png comes before frame10.png by."""
    parts = re.split(r"([0-9]+)", name)
    return [(1, int(part), part) if part.isdigit() else (0, 0, part) for part in parts]


def _open_video(path: Path, every: int) -> Iterator[Frames]:
    av = _pyav(f"reading the video {path.name}", "or name a folder of images")
    with path.open("rb") as file:
        with _read_errors(path):
            container = av.open(file, "r", options={"format_whitelist": _FORMATS}, io_open=_refuse,
                                metadata_errors="replace")
        with container:  # what fails in the caller's hands is not the video's fault
            if not container.streams.video:
                raise DataError(f"{path} holds no moving picture")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            _check_pixels(path, stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # of frames that grow on the way
            rate = float(stream.average_rate or stream.guessed_rate or FOLDER_RATE)
            yield Frames(_decode(path, container, stream, every), _count(stream, rate, every), rate / every)


def _decode(path: Path, container: Any, stream: Any, every: int) -> Iterator[tuple[str, Pixels]]:
    found = container.decode(stream)
    count = 0
    while True:
        with _read_errors(path):
            frame = next(found, None)
            if frame is None:
                break
            _check_pixels(path, frame.width, frame.height)
            if frame.is_corrupt:
                raise DataError(f"{path} cannot be read as a video: frame {count} is damaged")
            pixels = frame.to_ndarray(format="rgb24") if count % every == 0 else None
        if pixels is not None:
            yield f"frame {count}", np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        count += 1
    if count < _COMPLETE * stream.frames or not count:
        expected = f", of {stream.frames}" if stream.frames else ""
        raise DataError(f"{path} holds {count} frames that can be decoded{expected}: it is damaged or incomplete")


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Whatever a damaged video makes the library raise becomes a sentence; its errors are of many kinds."""
    try:
        yield
    except (PatchSSLError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read as a video: {_reason(error)}") from error


def _count(stream: Any, rate: float, every: int) -> int | None:
    """About how many frames will come."""
    seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
    frames = stream.frames or round(seconds * rate)
    return max(1, -(-frames // every)) if frames > 0 else None


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise DataError(f"{path} has frames of {width} x {height} pixels, more than {MOST_PIXELS:,}: not read")


def _refuse(url: str, *_: Any) -> Any:
    raise PermissionError(f"it asks for another file, {url}")


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _pyav(what: str, instead: str) -> Any:
    try:
        import av
        import av.error
    except ImportError:
        raise UsageError(f"{what} needs the library PyAV: pip install 'patchssl[video]', {instead}") from None
    return av


@contextmanager
def _write_mp4(partial: Path, out: Path, rate: float) -> Iterator[Add]:
    """H.264 that browsers play, one frame in memory; MPEG-4 where that encoder was not built in."""
    av = _pyav(f"writing {out.name}", "or name a .gif or .webp file")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    container = av.open(str(partial), "w", format="mp4", options={"movflags": "faststart", "fflags": "bitexact"})
    stream: list[Any] = []

    def add(pixels: Pixels) -> None:
        if not stream:
            made = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
            made.height, made.width, made.pix_fmt = *pixels.shape[:2], "yuv420p"
            made.options = {"crf": "18"} if codec == "libx264" else {"qscale": "2"}
            stream.append(made)
        container.mux(stream[0].encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))

    try:
        yield add
        container.mux(stream[0].encode())
    except av.error.FFmpegError as error:
        raise DataError(f"the video could not be written to {out}: {_reason(error)}") from error
    finally:
        container.close()


@contextmanager
def _write_animation(partial: Path, out: Path, rate: float) -> Iterator[Add]:
    """By Pillow, which wants all frames at the end."""
    gif, held = out.suffix.lower() == ".gif", list[Image.Image]()

    def add(pixels: Pixels) -> None:
        if (len(held) + 1) * pixels.nbytes // (3 if gif else 1) > MOST_HELD:
            raise UsageError(f"{out.name} is made of frames in memory, and {len(held)} of them are all of "
                             f"{MOST_HELD // 2**20} MiB; write an .mp4 file, or take fewer frames with --every")
        held.append(_with_palette(Image.fromarray(pixels)) if gif else Image.fromarray(pixels))

    yield add
    held[0].save(partial, format="GIF" if gif else "WEBP", save_all=True, append_images=held[1:], loop=0,
                 duration=max(10, round(1000 / rate)), **({} if gif else {"quality": 90}))


def _with_palette(image: Image.Image) -> Image.Image:
    """256 colors that reach into the corners of what `image` holds, as scales of color need, and dithering."""
    palette = image.quantize(256, Image.Quantize.MAXCOVERAGE)
    return image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
