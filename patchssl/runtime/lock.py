"""Folders that one process writes at a time: a lock that the system drops when its process ends, however it ends.

The lock is the system's (flock) on a small file that names its owner, removed at the end. Processes forked from the
owner share it: those of one that was killed may keep it for the seconds that they need to notice. Where a file system
has no such locks, or takes no file, work goes on without one: the first is said.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from patchssl.runtime.errors import FolderInUse, printable

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".patchssl.lock"
_LONGEST = 2000  # bytes of what an owner says of itself
_ORPHANS_SECONDS = 15  # that processes of a killed owner may need to end
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LockOwner:
    """Who holds a lock, as it wrote of itself."""

    host: str
    pid: int
    command: str
    since: str

    def text(self) -> str:
        """For a sentence."""
        where = "" if self.host == socket.gethostname() else f" on {self.host}"
        return printable(f"process {self.pid}{where}, begun {self.since}: {self.command[:200]}")


@contextmanager
def locked(folder: Path, remedy: str = "choose another --out, or stop that process first", *,
           file: str = LOCK_FILE, wait: bool = False) -> Iterator[None]:
    """`folder`, made where it is missing, for this process alone; `file` in it is the lock.

    FolderInUse, that names the owner and the `remedy`, where another process has it; with `wait`, when it is free.
    """
    path, new = folder / file, [part for part in (folder, *folder.parents) if not part.exists()]
    descriptor = _acquire(path, remedy, wait)
    try:
        yield
    finally:
        if descriptor is not None:
            _release(descriptor, path)
            with suppress(OSError):  # something was written
                for part in new:
                    part.rmdir()


def _release(descriptor: int, path: Path) -> None:
    """Remove the file while it is locked: who has opened it by then sees that it is gone."""
    try:
        with suppress(OSError):
            if _is_same(descriptor, path):
                path.unlink()
    finally:
        os.close(descriptor)


def _acquire(path: Path, remedy: str, wait: bool) -> int | None:
    """The locked file, None where there can be none."""
    while sys.platform != "win32":
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # removed by who made it, in between
            continue
        except OSError:  # a folder that takes no file: what is written to it says why
            return None
        if not _lock(descriptor, path, remedy, wait):
            os.close(descriptor)
            return None
        if _is_same(descriptor, path):
            _write_owner(descriptor)
            return descriptor
        os.close(descriptor)
    return None


def _lock(descriptor: int, path: Path, remedy: str, wait: bool) -> bool:
    """True when it is ours, False where the file system has no locks; the file is closed before an error."""
    began = time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                return True
            except BlockingIOError:
                if time.monotonic() > began + _ORPHANS_SECONDS or not _is_gone(_read_owner(descriptor)):
                    raise
            time.sleep(0.2)
    except BlockingIOError:
        owner = _read_owner(descriptor)
        os.close(descriptor)
        raise FolderInUse(path.parent, owner.text() if owner else "another process", remedy) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        log.warning("%s lies on a file system without locks (%s): see to it that no other process writes there",
                    path.parent, error.strerror)
        return False
    except BaseException:
        os.close(descriptor)
        raise


def _is_gone(owner: LockOwner | None) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    return owner is not None and owner.host == socket.gethostname() and not Path(f"/proc/{owner.pid}").exists() and (
        Path("/proc/self").exists())


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one at `path`: its last owner removed it at its end."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _write_owner(descriptor: int) -> None:
    owner = LockOwner(socket.gethostname(), os.getpid(), shlex.join(sys.argv)[:_LONGEST // 4],
                      datetime.now().astimezone().isoformat(" ", "seconds"))
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(owner)).encode(), 0)


def _read_owner(descriptor: int) -> LockOwner | None:
    """None where it says nothing, or nothing whole."""
    try:
        found = json.loads(os.pread(descriptor, _LONGEST, 0))
        return LockOwner(str(found["host"])[:255], int(found["pid"]), str(found["command"]), str(found["since"])[:40])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
