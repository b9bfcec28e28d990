import io
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from patchssl.bench import timing as bench_timing
from patchssl.bench import views as bench
from patchssl.runtime.errors import UnreadableImage


def test_center_is_exact_and_paper_is_not():
    center, paper = (bench.rule_quality(rule, num_pairs=500) for rule in ("center", "paper"))
    assert center["exact"] == 1 and center["off by more than a patch"] == 0
    assert 0.36 < paper["exact"] < 0.48  # 41.8 % over 6,000 pairs
    assert 0.08 < paper["off by more than a patch"] < 0.17  # 12.3 %
    assert min(center["matches"], paper["matches"]) > 20


def test_the_made_up_photograph_is_always_the_same_and_compresses_like_one():
    pixels = bench.made_up_photograph()
    assert pixels.shape == (375, 500, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, bench.made_up_photograph())
    assert 40 < pixels.std() < 60
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    assert 40_000 < len(file.getvalue()) < 60_000


def test_median_times_take_turns_and_divide_by_what_a_call_does():
    turns: list[tuple[str, int]] = []

    def spin(name: str, turn: int) -> None:
        turns.append((name, turn))
        began = time.process_time()
        while time.process_time() - began < bench_timing.TURN_SECONDS:
            pass

    times = bench_timing.median_times({"one": bench_timing.Candidate(lambda turn: spin("one", turn)),
                                       "four": bench_timing.Candidate(lambda turn: spin("four", turn), units=4)},
                                      repeats=3)
    assert times["one"] >= bench_timing.TURN_SECONDS and times["four"] >= bench_timing.TURN_SECONDS / 4
    assert [name for name, _ in turns[-6:]] == ["one", "four"] * 3


def test_one_thread_gives_the_threads_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), bench_timing.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_bench_matching_reports_every_rule_peer_and_patch_size():
    report = json.loads(json.dumps(bench.bench_matching(num_images=2, repeats=1, num_pairs=50)))
    assert set(report["milliseconds"]) == {"patch 32", "patch 16", "patch 8"}
    for row in report["milliseconds"].values():
        assert set(row) == {"center", "paper", "pair by pair", "similarity"}
        assert all(value > 0 for value in row.values())
    memory = report["MiB"]
    assert all(0 < row["center"] < row["similarity"] for row in memory.values())
    assert memory["patch 8"]["similarity"] > 30 * memory["patch 32"]["similarity"]  # patches grow 16 times
    row, ratios = report["milliseconds"]["patch 16"], report["times faster than"]
    assert ratios["similarity"]["patch 16"] == pytest.approx(row["similarity"] / row["center"])
    assert report["machine"]["threads"] == 1 and report["machine"]["versions"]["torch"] == torch.__version__


def test_peak_memory_counts_what_is_there_at_once():
    def work():
        first = torch.zeros(2**18)  # 1 MiB
        second = first + 1  # 2 MiB at once
        del first
        third = second.view(512, 512).exp_().T  # no memory of its own
        return third @ third + 1  # product and result beside it: 3 MiB at once, its operand included

    assert bench_timing.peak_memory(work) == 3
    assert bench_timing.peak_memory(lambda: None) == 0


def test_similarity_takes_the_teacher_token_of_greatest_cosine():
    teacher, local = bench._random_tokens(2, 32)
    globals_, locals_ = bench._similarity(teacher, local)
    assert globals_.shape == (2, 2, 49) and locals_.shape == (2, 2, 72)
    # student view 3, patch 5 of image 1 against teacher view 0
    cosines = torch.stack([(teacher[1, 0, n] * local[1, 3, 5]).sum() for n in range(49)])
    assert locals_[1, 0, 3 * 9 + 5] == cosines.argmax()
    cosines = torch.stack([(teacher[0, 1, n] * teacher[0, 0, 7]).sum() for n in range(49)])
    assert globals_[0, 1, 7] == cosines.argmax()


def test_bench_views_measures_a_users_photograph(tmp_path):
    path = tmp_path / "photograph.png"
    Image.fromarray(bench.made_up_photograph(90, 120)).save(path)
    report = json.loads(json.dumps(bench.bench_views(path, repeats=1)))
    assert report["image"] == {"height": 90, "width": 120, "bytes": path.stat().st_size}
    times = report["milliseconds"]
    ours = {"decode", "crops", "crops + color", "crops + patch-wise color"}
    assert ours < set(times) and all(value > 0 for value in times.values())
    ratio = report["times faster"]["peer: torchvision on PIL"]["crops"]
    assert ratio == pytest.approx(times["peer: torchvision on PIL"] / times["crops"])
    with pytest.raises(UnreadableImage, match="missing"):
        bench.bench_views(tmp_path / "missing.jpg")
