"""Small pictures for a page: files looked up by name below given folders, decoded and saved anew as JPEG."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from patchssl.data.decode import decode_image
from patchssl.eval.naming import leads_out
from patchssl.runtime.errors import UnreadableImage

SIDE = 176  # pixels of the longer side
_QUALITY = 78
_LARGEST_FILE = 128 * 2**20
MOST_BYTES = 12 * 2**20  # of all pictures of a page, as text


class Pictures:
    """Pictures of one page, each kept once: `number` gives a picture's place in `urls`.

    Nothing outside `folders` is opened, whatever a name or a link says. `problems` are sentences on files that are
    there and cannot be shown, `num_absent` counts names that were looked for in vain, `num_over` those that the page
    had no room for.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [folder.resolve() for folder in folders]
        self.urls: list[str] = []
        self.problems: list[str] = []
        self.num_absent = self.num_over = 0
        self._size = 0
        self._known: dict[tuple[str, int | None, str], int | None] = {}
        self._by_path: dict[Path, int | None] = {}

    def number(self, name: str, size: int | None, dataset: str) -> int | None:
        """The picture of the image `name` of `dataset` with `size` bytes (None: any); None where it has none."""
        key = name, size, dataset
        if key not in self._known:
            path = self.find(name, size, dataset)
            if path is None:
                self.num_absent += 1
            elif path not in self._by_path:
                self._by_path[path] = self._add(path)
            self._known[key] = None if path is None else self._by_path[path]
        return self._known[key]

    def find(self, name: str, size: int | None, dataset: str) -> Path | None:
        """Where the file lies; None where none of that name and size lies below the folders."""
        if leads_out(name):
            return None
        for path in self._candidates(name, dataset):
            try:
                inside = any(path.resolve().is_relative_to(folder) for folder in self.folders)
                if inside and path.is_file() and size in (None, path.stat().st_size):
                    return path
            except (OSError, ValueError, RuntimeError):  # a name too long, a zero byte, links in a circle
                continue
        return None

    def _candidates(self, name: str, dataset: str) -> Iterator[Path]:
        """As datasets lie in a folder of their own or in one for all of them."""
        own = dataset.removeprefix("own ").partition("+")[0]
        parts = ["", "jpg", "distractors"]
        if own and not leads_out(own):
            parts += [own, f"{own}/jpg", f"datasets/{own}/jpg", f"{own}/distractors"]
        for folder in self.folders:
            yield from (folder / part / name for part in parts)

    def _add(self, path: Path) -> int | None:
        if self._size >= MOST_BYTES:
            self.num_over += 1
            return None
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise UnreadableImage(str(path), f"it is larger than {_LARGEST_FILE // 2**20} MiB")
            url = thumbnail(path)
        except (UnreadableImage, OSError) as error:
            self.problems.append(f"the picture {path} is not shown: {error}")
            return None
        self._size += len(url)
        self.urls.append(url)
        return len(self.urls) - 1


def thumbnail(path: Path) -> str:
    """A data: address of a JPEG made from the pixels of `path`, at most 176 pixels wide and high; UnreadableImage."""
    image = Image.fromarray(decode_image(path))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return data_url("image/jpeg", file.getvalue())


def data_url(kind: str, content: bytes) -> str:
    """
    >>> data_url("image/png", b"abc")
    'data:image/png;base64,YWJj'
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
