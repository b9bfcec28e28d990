"""Files are whole at every moment, whoever else writes them."""

import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from patchssl.runtime.errors import DataError
from patchssl.runtime.files import replacing, whole_file, write_text


def test_an_error_leaves_the_file_before_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old\n", "note")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old\n"
    assert [each.name for each in path.parent.iterdir()] == ["a.txt"]


def test_what_the_disk_does_not_take_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old", "note")
    with pytest.raises(DataError, match=r"the note could not be written to .*a\.txt: No space left on device"), \
            whole_file(path, "note") as partial:
        partial.symlink_to("/dev/full")
        partial.write_text("new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="the note could not be written"):
        write_text(tmp_path / "folder", "new", "note")


def _write(path, letter):
    for _ in range(200):
        write_text(path, letter * 5000, "note")
    return os.getpid()


def test_processes_that_write_one_file_leave_one_text(tmp_path):
    path = tmp_path / "a.txt"
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_write, [path, path], "ab"))
    assert path.read_text() in ("a" * 5000, "b" * 5000)
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
