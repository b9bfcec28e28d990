"""From a model and moving pictures to a video of its class attention, one frame in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from patchssl.models.load import load_network
from patchssl.report.figures.tokens import attention_rows
from patchssl.report.figures.videofile import check_video_path, open_frames, write_video
from patchssl.report.plots.frames import draw_frame, make_sheet
from patchssl.runtime.console import Console
from patchssl.runtime.errors import DataError


def draw_attention_video(model: str, source: Path, out: Path, *, size: int | None = None, mass: float = 0.6,
                         every: int = 1, rate: float | None = None, device: torch.device, console: Console) -> int:
    """Write the attention of `model` on every `every`-th frame of `source`, a folder of images or a video file.

    `size`: short side in pixels that the network sees; `mass`: the share of attention whose patches are shown;
    `rate`: frames per second, by default the source's own. Returns how many frames were written; DataError, and no
    file, where a frame cannot be read or is of another size than the first.
    """
    check_video_path(out)
    with open_frames(source, every) as (frames, total, own_rate):
        backbone = load_network(model, device)
        side, progress = size or backbone.image_size, console.counter("frames")
        sheet, first, count = None, (0, 0), 0
        with write_video(out, rate or own_rate) as add:
            for count, (name, pixels) in enumerate(frames, 1):
                [(seen, attention)] = attention_rows(backbone, [pixels], side, names=[name],
                                                     say=console.say if sheet is None else None)
                if sheet is None:
                    first, sheet = pixels.shape[:2], make_sheet(seen.shape, f"{model}: {source.name}", mass)
                if pixels.shape[:2] != first:
                    raise DataError(f"{name} of {source} has {pixels.shape[0]} x {pixels.shape[1]} pixels and the "
                                    f"first frame {first[0]} x {first[1]}: frames of one video have one size")
                add(draw_frame(sheet, seen, attention, backbone.patch_size, mass))
                progress(count, max(count, total or count + 1))
        if total is not None and count < total:
            console.say(f"{source}: {count} of about {total} frames could be read")
        return count
