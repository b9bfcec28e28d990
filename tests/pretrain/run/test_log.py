"""The log and TensorBoard's copy of it: the same rows, without gaps or repetitions, whatever was cut short."""

import json
import os
import sys

import pytest
from cases import each
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from patchssl.pretrain.run.log import MetricLog, read_rows, write_whole
from patchssl.runtime.errors import PatchSSLError, UsageError


def row(step):
    return {"step": step, "loss": 1 / step, "lr": 1e-3 * step}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def scalars_of(folder):
    """What TensorBoard shows: {name: {step: value}}; repeated steps are an error."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert steps == sorted(set(steps))
        found[name] = {event.step: event.value for event in events.Scalars(name)}
    return found


def assert_board_shows(folder, rows):
    names = {name for each in rows for name in each} - {"step"}
    assert scalars_of(folder) == {name: pytest.approx({each["step"]: each[name] for each in rows if name in each},
                                                      rel=1e-6) for name in names}


def write(folder, steps, *, done=0, tensorboard=True, close=True):
    book = MetricLog(folder, done, tensorboard=tensorboard)
    for step in steps:
        book.append(row(step))
    if close:
        book.close()
    return book


def test_rows_and_scalars_are_the_same(tmp_path):
    write(tmp_path, [1, 3, 4])
    assert rows_of(tmp_path) == [row(1), row(3), row(4)]
    assert_board_shows(tmp_path, rows_of(tmp_path))


def test_a_row_is_on_the_disk_before_the_next(tmp_path):
    """A kill loses nothing that a checkpoint knows of."""
    write(tmp_path, [1, 2], close=False)
    assert_board_shows(tmp_path, [row(1), row(2)])


@each("done", [2, 4, 6])
def test_what_came_after_the_checkpoint_is_taken_back(tmp_path, done):
    write(tmp_path, range(1, 7), close=False)
    write(tmp_path, range(done + 1, 9), done=done)
    assert rows_of(tmp_path) == [row(step) for step in range(1, 9)]
    assert_board_shows(tmp_path, rows_of(tmp_path))


def test_a_run_that_begins_anew_has_nothing_of_the_one_before(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [2])
    assert rows_of(tmp_path) == [row(2)]
    assert_board_shows(tmp_path, [row(2)])


def test_event_files_asked_for_later_begin_with_the_rows_that_are_there(tmp_path):
    write(tmp_path, [1, 2, 3], tensorboard=False)
    assert not (tmp_path / "tensorboard").exists()
    write(tmp_path, [3, 4], done=2)
    assert_board_shows(tmp_path, [row(1), row(2), row(3), row(4)])


@each("wreck", [b'{"step": 3, "lo', b"\x00" * 40, b"\xff\xfe\n", b'"step"\n[1]\n', b"\n"])
def test_lines_cut_short_are_dropped(tmp_path, wreck):
    write(tmp_path, [1, 2], tensorboard=False)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + wreck)
    book = write(tmp_path, [3], done=2, tensorboard=False)
    assert rows_of(tmp_path) == [row(1), row(2), row(3)]
    assert book.last == row(3)


def test_an_event_file_cut_short_costs_nothing_that_is_written_again(tmp_path):
    write(tmp_path, [1, 2, 3])
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-20])
    write(tmp_path, [3, 4], done=2)
    assert_board_shows(tmp_path, [row(1), row(2), row(3), row(4)])


def test_the_last_row_can_be_completed(tmp_path):
    write(tmp_path, [1, 2])
    book = MetricLog(tmp_path, 2, tensorboard=True)
    assert book.complete_last({"knn_top1": 0.5}) == row(2) | {"knn_top1": 0.5}
    book.append(row(3))
    book.close()
    assert rows_of(tmp_path) == [row(1), row(2) | {"knn_top1": 0.5}, row(3)]
    assert_board_shows(tmp_path, rows_of(tmp_path))


def test_without_the_library_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match=r"run\.tensorboard = true .* pip install 'patchssl\[tensorboard\]'"):
        MetricLog(tmp_path, 0, tensorboard=True)
    assert MetricLog(tmp_path, 0, tensorboard=False).board is None


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_whole(path, "old")
    monkeypatch.setattr("patchssl.runtime.files.secrets.token_hex", lambda _: "x")
    (tmp_path / f".run.json.{os.getpid()}.x.partial").symlink_to("/dev/full")
    with pytest.raises(PatchSSLError, match=r"run\.json could not be written"):
        write_whole(path, "new" * 10_000)
    assert path.read_text() == "old"


def test_rows_of_a_run_under_way_are_read_without_the_half_written_one(tmp_path):
    assert read_rows(tmp_path / "log.jsonl") == []
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(row(1))}\n{json.dumps(row(2))}\n{json.dumps(row(3))[:7]}")
    assert read_rows(tmp_path / "log.jsonl") == [row(1), row(2)]
