"""Locks on folders: one owner at a time, named; gone with its process, and no obstacle where there can be none."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from patchssl.runtime import lock
from patchssl.runtime.errors import FolderInUse
from patchssl.runtime.lock import LOCK_FILE, locked

HOLD = ("import os, sys, time\nfrom pathlib import Path\nfrom patchssl.runtime.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    if len(sys.argv) < 3 or not os.fork():\n        print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n")


def holder(folder, *more):
    """A process that holds `folder`, and the first word it says."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder, *more], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_the_second_is_told_who_the_first_is_and_what_to_do(tmp_path):
    process, _ = holder(tmp_path / "run")
    said = rf"run is in use by process {process.pid}, begun 2.*-c.*; wait for it"
    with pytest.raises(FolderInUse, match=said) as no, locked(tmp_path / "run", "wait for it"):
        pass
    assert no.value.exit_code == 1
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked(tmp_path / "run"):  # dropped by the system
        assert str(os.getpid()) in (tmp_path / "run" / LOCK_FILE).read_text()


def test_what_a_killed_process_forked_may_keep_its_lock_for_a_while_and_no_longer(tmp_path, monkeypatch):
    """Readers of images end some seconds after the process that started them was killed."""
    process, child = holder(tmp_path, "fork")
    assert child != process.pid
    process.kill()
    process.wait()
    monkeypatch.setattr(lock, "_ORPHANS_SECONDS", 0.5)
    with pytest.raises(FolderInUse, match=f"process {process.pid}"), locked(tmp_path):
        pass
    monkeypatch.setattr(lock, "_ORPHANS_SECONDS", 60)
    threading.Timer(1, os.kill, (child, signal.SIGKILL)).start()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_nothing_is_left_of_it(tmp_path):
    with locked(tmp_path / "runs" / "new"):
        assert (tmp_path / "runs" / "new" / LOCK_FILE).is_file()
    assert not (tmp_path / "runs").exists()
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "kept").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


def test_one_process_does_not_hold_a_folder_twice(tmp_path):
    with locked(tmp_path), pytest.raises(FolderInUse, match=f"process {os.getpid()}"), locked(tmp_path):
        pass


def test_without_locks_a_warning_is_said(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        pass
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} lies on a file system without locks (No locks available): see to it that no other process "
        "writes there"]


def test_a_folder_that_takes_no_file_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(path, flags, mode):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock.os, "open", refuse)
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_an_owner_that_says_nothing_is_another_process(tmp_path):
    with locked(tmp_path):
        (tmp_path / LOCK_FILE).write_bytes(b"\xff{")
        with pytest.raises(FolderInUse, match="in use by another process; "), locked(tmp_path):
            pass
