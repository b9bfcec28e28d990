"""The bench of the benchmarks, small: what it reports and shows; its numbers are for another day."""

import io
import json

import pytest
import torch
from rich.console import Console as RichConsole

from patchssl.bench import eval as bench_eval
from patchssl.data.open import open_pair
from patchssl.models.load import load_backbone
from patchssl.runtime.console import Console

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=16&embed_dim=24&num_heads=3&depth=2"


@pytest.mark.slow
def test_probes_are_timed_on_one_thread_with_progress_and_time_left(colors):
    console = Console(seconds_between_lines=0)
    console._rich = RichConsole(file=io.StringIO())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        report = bench_eval.bench_probes(2, console=console, backbone=load_backbone(SMALL), train=open_pair(colors)[0],
                                         val=open_pair(colors)[1], batch_size=16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert json.loads(json.dumps(report)) == report
    assert report["threads"] == 1
    shown = console._rich.file.getvalue()
    assert [what for what in ("features", "48 cached probes", "dino, 2 epochs") if what not in shown] == []
    assert " left" in shown


def test_every_part_of_the_bench_has_an_aim(monkeypatch):
    parts = {"k-NN": "bench_search", "k-NN, large": "bench_large_search", "revisited": "bench_ranking",
             "linear probes": "bench_probes", "suite": "bench_suite"}
    for part, name in parts.items():
        monkeypatch.setattr(bench_eval, name, lambda *_, part=part, **__: {"what": part})
    report = bench_eval.bench_eval("random:resnet10t", "textures")
    assert {part: report[part] for part in parts} == {part: {"what": part} for part in parts}
    assert [part for part in parts if not any(aim.startswith(f"{part}: ") for aim in report["aims"])] == []
    assert "suite" not in bench_eval.bench_eval()


def test_ranking_by_counting_equals_the_plain_way():
    report = bench_eval.bench_ranking(database=6000, queries=3, repeats=1)
    assert report["largest difference"] == pytest.approx(0, abs=1e-9)
    assert report["seconds"].keys() == {"by counting", "plain"}
