import dataclasses
import math

import numpy as np
import pytest

from patchssl.eval.records import Result, pack_bits
from patchssl.report.tables.best import best_cells
from patchssl.report.tables.build import comparison_table, score_table
from patchssl.report.tables.render import to_markdown
from patchssl.report.tables.scores import collect_scores
from patchssl.report.tables.stats import welch_p

BASE = Result(model="m", method="other", arch="vit", weights_sha256="a" * 64, task="knn", dataset="set",
              dataset_fingerprint="d" * 64, protocol="native", protocol_version=1, protocol_settings={},
              protocol_fingerprint="1" * 16, metrics={"top1@20": 0.5}, versions={}, device="cpu", duration=1.0)


def network(name: str, share: float, num: int = 1000, seed: int | None = None, **changes: object) -> Result:
    """Right on the first images only."""
    correct = np.arange(num) < round(share * num)
    facts = {"model": name, "weights_sha256": f"{name}{seed}".encode().hex().ljust(64, "0"), "seed": seed,
             "metrics": {"top1@20": float(correct.mean())},
             "detail": {"num_test": num, "correct": {"top1@20": pack_bits(correct)}}}
    return dataclasses.replace(BASE, **{**facts, **changes})


def bold(*records: Result) -> list[str]:
    return [row.label for row, _ in sorted(best_cells(collect_scores(records, "knn")))]


def test_the_best_is_bold_when_it_beats_every_other_row():
    assert bold(network("a", 0.50), network("b", 0.60), network("c", 0.40)) == ["b"]
    # six images more out of 1,000 are 2 of 64 sign patterns, five 2 of 32
    assert bold(network("a", 0.500), network("b", 0.506), network("c", 0.4)) == ["b"]
    assert bold(network("a", 0.500), network("b", 0.505), network("c", 0.4)) == []


def test_one_row_a_tie_and_other_columns_give_nothing():
    assert bold(network("a", 0.5)) == []
    assert bold(network("a", 0.5), network("b", 0.5)) == []
    assert bold(network("a", 0.5), network("b", 0.9, protocol_fingerprint="2" * 16)) == []


def test_without_detail_or_with_other_images_nothing_is_claimed():
    assert bold(network("a", 0.5), network("b", 0.9, detail={})) == []
    assert bold(network("a", 0.5), network("b", 0.9, num=500)) == []


def test_seeds_are_compared_by_their_t_test():
    def seeds(method: str, *shares: float) -> list[Result]:
        return [network(method, share, seed=seed, method=method) for seed, share in enumerate(shares)]

    assert bold(*seeds("dino", 0.30, 0.31, 0.32), *seeds("pwself", 0.40, 0.41, 0.42)) == ["PW-Self"]
    assert bold(*seeds("dino", 0.30, 0.40, 0.50), *seeds("pwself", 0.40, 0.41, 0.42)) == []
    # of images alone this would be clear: 100 of 1,000
    assert bold(*seeds("dino", 0.30, 0.40, 0.50), *seeds("pwself", 0.50)) == []
    shared = [dataclasses.replace(record, seed=0) for record in seeds("pwself", 0.40, 0.41, 0.42)]
    # which share a seed are not averaged: single networks, and the best of them is as good as the next
    close = [dataclasses.replace(record, seed=0) for record in seeds("pwself", 0.418, 0.419, 0.420)]
    assert bold(*seeds("dino", 0.30, 0.31, 0.32), *close) == []
    [label] = bold(*seeds("dino", 0.30, 0.31, 0.32), *shared)
    assert label.startswith("PW-Self, pwself ")


def test_the_p_value_of_seeds_is_the_textbooks():
    # equal spread 0.01, three each: t = 0.1 / (0.01 sqrt(2/3)) = 12.247 with 4 degrees of freedom
    t = 0.1 / (0.01 * math.sqrt(2 / 3))
    # closed form for 4 degrees of freedom: P(|T| > t) = 1 - x (3 - x^2) / 2, x = t / sqrt(4 + t^2)
    x = t / math.sqrt(4 + t * t)
    assert welch_p([0.30, 0.31, 0.32], [0.40, 0.41, 0.42]) == pytest.approx(1 - x * (3 - x * x) / 2, rel=1e-6)
    # one against three: pooled spread 0.01, t = 0.1 / (0.01 sqrt(4/3)), 2 degrees of freedom: 1 - t / sqrt(2 + t^2)
    t = 0.1 / (0.01 * math.sqrt(4 / 3))
    assert welch_p([0.30, 0.31, 0.32], [0.41]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    assert welch_p([0.3], [0.4]) == welch_p([0.3, 0.3], [0.4, 0.4]) == 1


def test_bold_stands_in_text_and_numbers():
    records = [network("a", 0.5), network("b", 0.6)]
    table = comparison_table(records)
    assert table.attrs["bold"] == [(1, 3)]
    assert " **60.0 [56.9, 63.0]** |" in to_markdown(table)
    assert sum("**" in line for line in to_markdown(table).splitlines()) == 1
    assert any(note.startswith("Bold:") for note in table.attrs["notes"])
    assert score_table(records).best.tolist() == [False, True]
