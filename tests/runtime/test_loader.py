"""Batches that arrive where shared memory and open files are short, and waits that end."""

import os
import resource
import time
from dataclasses import dataclass

import pytest
import torch
from cases import each
from torch import Tensor
from torch.utils.data import Dataset

from patchssl.runtime import loader as loaders
from patchssl.runtime.errors import DataError, PatchSSLError
from patchssl.runtime.loader import BatchLoader, lost_worker


@dataclass(frozen=True)
class Batch:
    pixels: Tensor
    parts: tuple[dict[str, Tensor], list[Tensor]]
    names: tuple[str, ...]


class Numbers(Dataset):
    def __getitem__(self, key):
        return torch.full((1000,), float(key))


def collate(items):
    whole = torch.stack(items)
    return Batch(whole, ({"first": whole[0].clone()}, [whole[:, :0], whole.expand(2, -1, -1)]), ("a",))


def batches_of(workers=2, **options):
    keys = [[start, start + 1] for start in range(0, 20, 2)]
    return BatchLoader(Numbers(), keys, collate, workers=workers, pin_memory=False, **options)


def assert_right(batches):
    batches = list(batches)
    assert [batch.pixels[:, 0].tolist() for batch in batches] == [[k, k + 1.0] for k in range(0, 20, 2)]
    for batch in batches:
        assert torch.equal(batch.parts[0]["first"], batch.pixels[0])
        assert batch.parts[1][0].shape == (2, 0)
        assert torch.equal(batch.parts[1][1], batch.pixels.expand(2, -1, -1))
        assert batch.names == ("a",)


@each("workers", [0, 1, 3])
def test_batches_come_whole_and_in_order(workers, caplog):
    assert_right(batches_of(workers))
    assert not caplog.records


def no_room(tensor):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\nmore")


def test_what_cannot_be_shared_comes_through_a_pipe_and_that_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(Tensor, "share_memory_", no_room)  # workers are forked
    assert_right(batches_of())
    [record] = caplog.records
    assert "cannot share them" in record.getMessage()
    assert "No space left on device (28); docker run --shm-size=8g" in record.getMessage()


def test_more_open_files_than_a_process_may_have_are_not_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(loaders, "_raise_file_limit", lambda: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (220, hard))
    try:
        assert_right(batches_of())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "24 tensors under way need as many open files, and a process may open 220" in caplog.text


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        assert_right(batches_of())
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65536), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_room_for_any_worker_this_process_reads(monkeypatch, caplog):
    def no_semaphore():
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(loaders.multiprocessing, "Semaphore", no_semaphore)
    assert_right(batches_of())
    assert "read in this process, which is slower" in caplog.text
    assert "(Read-only file system)" in caplog.text


class Stuck(Dataset):
    def __getitem__(self, key):
        time.sleep(60)


class Slow(Dataset):
    def __getitem__(self, key):
        time.sleep(1.5)
        return torch.tensor([float(key)])


def test_a_wait_ends_and_says_what_to_do(monkeypatch, caplog):
    monkeypatch.setattr(loaders, "_TICK", 0.3)
    monkeypatch.setattr(loaders, "_PATIENCE", 3)
    began = time.monotonic()
    with pytest.raises(PatchSSLError, match=r"no batch has come for 1 s from the 1 worker processes.*with 0 workers"):
        list(BatchLoader(Stuck(), [[0]], list, workers=1, pin_memory=False))
    assert time.monotonic() - began < 20
    assert [record.getMessage()[:22] for record in caplog.records] == ["no batch has come for "] * 2


def test_a_slow_batch_is_waited_for(monkeypatch):
    monkeypatch.setattr(loaders, "_TICK", 0.4)
    found = list(BatchLoader(Slow(), [[0], [1], [2]], list, workers=1, pin_memory=False))
    assert [float(batch[0]) for batch in found] == [0, 1, 2]


class Killed(Dataset):
    def __getitem__(self, key):
        os.kill(os.getpid(), 9)


class Refused(Dataset):
    def __getitem__(self, key):
        raise DataError("none of the images can be read:\n  a.png")


@each("workers", [0, 2])
def test_a_sentence_of_a_worker_comes_as_it_was_said(workers):
    with pytest.raises(DataError) as told:
        list(BatchLoader(Refused(), [[0]], list, workers=workers, pin_memory=False))
    assert str(told.value) == "none of the images can be read:\n  a.png"


def test_a_worker_that_ends_is_told_from_an_error_of_its_own():
    with pytest.raises(RuntimeError) as gone:
        list(BatchLoader(Killed(), [[0]], list, workers=1, pin_memory=False))
    assert lost_worker(gone.value) is gone.value
    assert lost_worker(ValueError("a mistake")) is None


