"""One file over HTTP: resumes where an earlier try stopped, tries mirrors in turn, and checks what came.

The file grows as TARGET.partial and gets its name when all of it is there and its size and checksum are right: what
is called TARGET is whole. Proxies are those of the environment (HTTPS_PROXY and its kind).
"""

from __future__ import annotations

import hashlib
import shutil
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from patchssl import __version__
from patchssl.runtime.errors import DataError, UsageError

ByteProgress = Callable[[int, int | None], None]  # bytes that are there, bytes in all where the server says so
ATTEMPTS = 3  # in a row that bring nothing new, at one address
_GROWTH = 2**20  # bytes that count as something new
_BLOCK = 2**20
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers that may be another one soon


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is known of a file beforehand."""

    md5: str | None = None
    sha256: str | None = None
    size: int | None = None  # bytes

    def objection(self, path: Path) -> str | None:
        """Why the file `path` is not the wanted one; None if nothing speaks against it."""
        if self.size is not None and (size := path.stat().st_size) != self.size:
            return f"it has {size:,} bytes instead of {self.size:,}"
        for kind, right in (("md5", self.md5), ("sha256", self.sha256)):
            if right is not None and (found := checksum(path, kind)) != right.lower():
                return f"its {kind} is {found} instead of {right}"
        return None


def checksum(path: Path, kind: str = "sha256") -> str:
    """Checksum of a file's content in hex; `kind` is a name that hashlib knows."""
    digest = hashlib.new(kind, usedforsecurity=kind != "md5")
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def download(
    urls: Sequence[str],
    target: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    progress: ByteProgress | None = None,
    timeout: float = 15.0,
    pause: float = 1.0,
) -> Path:
    """Fetch `target` from the first of `urls` that has it, unless it is there; what is known of it is checked.

    `timeout` is the longest silence in seconds; `pause` the wait before a second attempt, doubled for the next one.
    What came before a failure stays in TARGET.partial for another run. UsageError for an address that is not
    http(s); DataError, with the reason of every address, when none has the file, and for a `target` that is there
    and is another file.
    """
    wanted = Wanted(md5=md5, sha256=sha256, size=size)
    if strange := [url for url in urls if urlsplit(url).scheme not in ("http", "https")]:
        raise UsageError(f"'{strange[0]}' is no address of a file on the web; it begins with https:// or http://")
    if target.exists():
        if wrong := wanted.objection(target):
            raise DataError(f"{target} is there, but {wrong}: remove it, then it is fetched anew")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    failures = []
    for url in urls:
        try:
            _Address(url, partial, wanted, progress, timeout, pause).fetch()
        except _Failed as failure:
            failures.append(f"\n  {url}: {failure}")
        else:
            partial.replace(target)
            return target
    kept = f"; {_size(partial):,} bytes are in {partial}, and the next run resumes there" if _size(partial) else ""
    raise DataError(f"{target.name} could not be fetched:{''.join(failures)}\nTry again later, or get the file by "
                    f"other means and save it as {target}{kept}")


class _Failed(Exception):
    """An address did not give the file; `passing` if it may do so the next time."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but not from an encrypted address to one that is not, and to none but the web."""

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any,
                         newurl: str) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and (scheme != "http" or urlsplit(req.full_url).scheme == "https"):
            raise _Failed(f"it leads to {newurl}, which is not encrypted, and is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclass(frozen=True)
class _Address:
    """One address, and the partial file that it is to complete."""

    url: str
    partial: Path
    wanted: Wanted
    progress: ByteProgress | None
    timeout: float
    pause: float

    def fetch(self) -> None:
        """Leave a complete and right file at `partial`, or raise _Failed."""
        for _ in range(2):
            continued = _size(self.partial) > 0
            self._fill()
            if (wrong := self.wanted.objection(self.partial)) is None:
                return
            self.partial.unlink()
            if not continued:  # what was there before may have been of another file: all of it once more
                break
        raise _Failed(f"{wrong}, and it was thrown away")

    def _fill(self) -> None:
        """Attempts until the file ends, or until too many of them in a row bring nothing new."""
        most, vain, came = _size(self.partial), 0, False
        while True:
            try:
                return self._attempt()
            except _Failed as failure:
                size = _size(self.partial)
                came = came or size > most
                if not (failure.passing or (came and isinstance(failure.__cause__, URLError))):
                    raise
                vain = 1 if size >= most + _GROWTH else vain + 1
                most = max(most, size)
                if vain == ATTEMPTS:
                    raise _Failed(f"{failure} ({ATTEMPTS} attempts)") from None
                time.sleep(self.pause * 2 ** (vain - 1))

    def _attempt(self) -> None:
        """One request, for what is not there yet."""
        have = _size(self.partial)
        request = urllib.request.Request(self.url, headers={"User-Agent": f"patchssl/{__version__}"})
        if have:
            request.add_header("Range", f"bytes={have}-")
        opener = urllib.request.build_opener(_Redirects)
        try:
            with opener.open(request, timeout=self.timeout) as response:
                self._receive(response, have)
        except HTTPError as error:
            with error:
                if error.code == 416 and have:  # nothing follows: the file is complete, or a longer one is there
                    return self._compare(have, error.headers.get("Content-Range", ""))
            login = "; the server asks for a login" if error.code == 401 else ""
            raise _Failed(f"HTTP {error.code} {error.reason}{login}", passing=error.code in _PASSING) from None
        except URLError as error:
            raise _Failed(f"no connection: {_words(error.reason)}") from error
        except (HTTPException, OSError, ValueError) as error:
            raise _Failed(f"the connection broke after {_size(self.partial):,} bytes: {_words(error)}",
                          passing=True) from error

    def _compare(self, have: int, content_range: str) -> None:
        """Nothing to do if the server's file is as long as what is there; else begin anew."""
        if content_range != f"bytes */{have}":
            self.partial.unlink()
            raise _Failed(f"what was there ({have:,} bytes) is no part of the file", passing=True)

    def _receive(self, response: HTTPResponse, have: int) -> None:
        """Write what the server sends behind the `have` bytes, or in their place."""
        if response.status not in (200, 206):
            raise _Failed(f"HTTP {response.status} {response.reason}, which is no file")
        if response.headers.get_content_type() == "text/html":
            raise _Failed("the answer is a web page and not the file: perhaps the file has moved, or a login is needed")
        if response.status == 200 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            if response.status == 206:
                raise _Failed("the server sends another part of the file than was asked for")
            have = 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        self._require_room(have, total)
        done = self._write(response, have, total)
        if total is not None and done < total:
            raise _Failed(f"the connection was cut off after {done:,} of {total:,} bytes", passing=True)

    def _require_room(self, have: int, total: int | None) -> None:
        """_Failed if the size is not the wanted one, DataError if the disk cannot hold it."""
        if total is None:
            return
        if self.wanted.size not in (None, total):
            raise _Failed(f"the file has {total:,} bytes there instead of {self.wanted.size:,}")
        if (free := shutil.disk_usage(self.partial.parent).free) < total - have:
            raise DataError(f"{self.partial.parent} has {free:,} bytes free, and {total - have:,} are needed for "
                            f"{self.url}: make room, or choose a folder on another disk")

    def _write(self, response: HTTPResponse, have: int, total: int | None) -> int:
        """Bytes in the partial file when the answer ended."""
        done = told = have
        try:
            file = self.partial.open("ab" if have else "wb")
        except OSError as error:
            raise _unwritten(self.partial, error) from error
        with file:
            while block := response.read1(_BLOCK):
                try:
                    file.write(block)
                    file.flush()
                except OSError as error:
                    raise _unwritten(self.partial, error) from error
                done += len(block)
                if self.progress and done - told >= _BLOCK:
                    self.progress(done, total)
                    told = done
        if self.progress:
            self.progress(done, total)
        return done


def _unwritten(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be written: {error.strerror or error}")


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _words(error: object) -> str:
    """What an error of the system says, without its number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
