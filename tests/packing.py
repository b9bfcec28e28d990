"""Archives and shards of small images, as tests of several modules need them."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def png(value: int, size: tuple[int, int] = (4, 6)) -> bytes:
    """A gray image of one value."""
    content = io.BytesIO()
    Image.fromarray(np.full(size, value, dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    """`files` as a .tar or .zip, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in files.items():
                packed.writestr(name, content)
        return path
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unpack(folder: Path, files: Mapping[str, bytes]) -> Path:
    """`files` below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_shards(folder: Path, count: int, per_shard: int, prefix: str = "shards-", classes: int = 3) -> list[Path]:
    """Shards by hand: image i is gray i and has the label i modulo `classes`."""
    paths = []
    for shard, first in enumerate(range(0, count, per_shard)):
        files = {}
        for index in range(first, min(first + per_shard, count)):
            files[f"{index:05d}.png"] = png(index % 256)
            files[f"{index:05d}.cls"] = str(index % classes).encode()
        paths.append(pack(folder / f"{prefix}{shard:06d}.tar", files))
    return paths
