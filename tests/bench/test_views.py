import io
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from patchssl.bench import timing, views
from patchssl.runtime.errors import UnreadableImage


def test_the_made_up_photograph_is_always_the_same_and_compresses_like_one():
    pixels = views.made_up_photograph()
    assert pixels.shape == (375, 500, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, views.made_up_photograph())
    assert 40 < pixels.std() < 60
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    assert 40_000 < len(file.getvalue()) < 60_000


def test_median_times_take_turns_and_divide_by_what_a_call_does():
    turns: list[tuple[str, int]] = []

    def spin(name: str, turn: int) -> None:
        turns.append((name, turn))
        began = time.process_time()
        while time.process_time() - began < timing.TURN_SECONDS:
            pass

    times = timing.median_times({"one": timing.Candidate(lambda turn: spin("one", turn)),
                                 "four": timing.Candidate(lambda turn: spin("four", turn), units=4)}, repeats=3)
    assert times["one"] >= timing.TURN_SECONDS and times["four"] >= timing.TURN_SECONDS / 4
    assert [name for name, _ in turns[-6:]] == ["one", "four"] * 3


def test_one_thread_gives_the_threads_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), timing.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_peak_memory_counts_what_is_there_at_once():
    def work():
        first = torch.zeros(2**18)  # 1 MiB
        second = first + 1  # 2 MiB at once
        del first
        third = second.view(512, 512).exp_().T  # no memory of its own
        return third @ third + 1  # product and result beside it: 3 MiB at once, its operand included

    assert timing.tensor_memory(work) == 3
    assert timing.tensor_memory(lambda: None) == 0


def test_bench_views_measures_a_users_photograph(tmp_path):
    path = tmp_path / "photograph.png"
    Image.fromarray(views.made_up_photograph(90, 120)).save(path)
    report = json.loads(json.dumps(views.bench_views(path, repeats=1)))
    assert report["image"] == {"height": 90, "width": 120, "bytes": path.stat().st_size}
    times = report["milliseconds"]
    ours = {"decode", "crops", "crops + color", "crops + color + layered", "crops + replaced"}
    assert ours < set(times) and all(value > 0 for value in times.values())
    ratio = report["times faster"]["peer: torchvision on PIL"]["crops"]
    assert ratio == pytest.approx(times["peer: torchvision on PIL"] / times["crops"])
    with pytest.raises(UnreadableImage, match="missing"):
        views.bench_views(tmp_path / "missing.jpg")
