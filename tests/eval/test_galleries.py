"""Which queries a record shows, and whom they found, beside plain sorting."""

import numpy as np
from cases import each

from patchssl.data.images import FileImages, Names
from patchssl.eval.galleries import Picture, Shown, ends_of, first_results, gallery, latest


@each("num", [1, 2, 7, 16, 40])
def test_ends_are_the_lowest_and_highest_aps_and_no_query_stands_twice(num):
    aps = np.random.default_rng(num).permutation(num) / num
    chosen = ends_of(aps)
    worst = [query for query, end in chosen if end == "worst"]
    best = [query for query, end in chosen if end == "best"]
    ascending = sorted(range(num), key=lambda query: aps[query])
    assert worst == ascending[: len(worst)]
    assert best == ascending[::-1][: len(best)]
    assert len(chosen) == len({query for query, _ in chosen}) == min(num, 16)


def test_queries_without_positives_are_no_ends():
    assert ends_of(np.array([np.nan, 0.5, np.nan])) == [(1, "worst")]
    assert ends_of(np.array([np.nan])) == []


def test_first_results_are_those_of_a_stable_sort():
    rng = np.random.default_rng(0)
    for size in (1, 5, 10, 300):
        scores = rng.integers(0, 6, size) / 6  # many ties
        assert first_results(scores).tolist() == np.argsort(-scores, kind="stable")[:10].tolist()


def test_late_positives_are_the_last_ones_with_their_ranks():
    scores = -np.arange(100.0)
    assert latest(scores, np.array([99, 3, 50, 12, 10, 9, 70])) == [(12, 13), (50, 51), (70, 71), (99, 100)]
    assert latest(scores, np.array([9])) == []


def test_a_gallery_names_files_and_their_sizes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"12345")
    images = FileImages(name="x", split="all", source="x", root=tmp_path, names=Names(["a.jpg", "gone.jpg"]))
    shown = Shown(Picture(images, 0), [(Picture(images, 1), "error")], [(Picture(images, 0), 12)], 3)
    assert gallery(np.array([0.12345678]), [shown]) == [{
        "query": {"name": "a.jpg", "bytes": 5}, "ap": 0.123457, "end": "worst", "num_positives": 3,
        "results": [{"name": "gone.jpg", "bytes": None, "role": "error"}],
        "late": [{"name": "a.jpg", "bytes": 5, "rank": 12}]}]
