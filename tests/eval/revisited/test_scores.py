import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import each
from hypothesis import example, given
from hypothesis import strategies as st

from patchssl.eval.revisited import ranking, score_ranking, score_similarity
from patchssl.eval.revisited.ranking import levels_of_ranking, levels_of_similarity, ranks_of
from patchssl.runtime.errors import DataError
from patchssl.sets.revisited import GroundTruth, as_truths

OFFICIAL = json.loads((Path(__file__).parents[2] / "data" / "revisited_official.json").read_text())
CLASSES = {"easy": ({"easy"}, {"hard", "junk"}), "medium": ({"easy", "hard"}, {"junk"}),
           "hard": ({"hard"}, {"easy", "junk"})}


def stable_ranks(similarity):
    """(database, queries): ids by falling similarity, the lower id first."""
    return np.argsort(-np.asarray(similarity, dtype=np.float64), axis=1, kind="stable").T


def random_truth(rng, num_images, num_queries, most=6):
    """Lists of 0 to `most` images without overlap."""
    truth = []
    for _ in range(num_queries):
        sizes = rng.integers(0, min(most, num_images // 3) + 1, 3)
        parts = np.split(rng.permutation(num_images)[: sizes.sum()], np.cumsum(sizes)[:-1])
        truth.append(dict(zip(("easy", "hard", "junk"), map(np.ndarray.tolist, parts), strict=True)))
    return truth


def slow_scores(ranks, truth, level):
    """AP and precision of a query from the list without junk, walked image by image."""
    positive, junk = ({i for name in names for i in truth[name]} for names in CLASSES[level])
    if not positive:
        return None
    shown = [image in positive for image in ranks if image not in junk]
    area, found, precision = 0.0, 0, 1.0
    for place, right in enumerate(shown, start=1):
        found += right
        if right:
            area += (precision + found / place) / 2 / len(positive)
        precision = found / place
    last = max(i for i, right in enumerate(shown) if right) + 1
    return {"map": area, **{f"mp@{k}": sum(shown[: min(k, last)]) / min(k, last) for k in (1, 5, 10)}}


@each("case", OFFICIAL["cases"], ids=lambda case: case["name"])
def test_scores_equal_what_the_official_code_answered(case):
    levels = {"ranking": levels_of_ranking(stable_ranks(case["similarity"]), case["gnd"]),
              "similarity": levels_of_similarity(np.array(case["similarity"]), case["gnd"])}
    for found in levels.values():
        for level, expected in case["expected"].items():
            if expected is None:  # no query has positives: the official code divides by zero
                assert found[level].num_queries == 0
                assert all(math.isnan(value) for value in found[level].means().values())
                continue
            means = found[level].means()
            assert means["map"] == pytest.approx(expected["map"], abs=1e-12)
            np.testing.assert_allclose(found[level].aps, np.array(expected["aps"], dtype=float), atol=1e-12)
            assert found[level].num_queries == sum(ap is not None for ap in expected["aps"])
            for k, mean, single in zip(OFFICIAL["ks"], expected["mp"], zip(*expected["precisions"], strict=True),
                                       strict=True):
                assert means[f"mp@{k}"] == pytest.approx(mean, abs=1e-12)
                np.testing.assert_allclose(found[level].precisions[k], np.array(single, dtype=float), atol=1e-12)


@given(st.integers(0, 2**32), st.integers(10, 60), st.integers(1, 5), st.sampled_from([2, 5, 10**6]))
def test_scores_equal_those_of_a_list_without_junk(seed, num_images, num_queries, num_values):
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, num_values, (num_queries, num_images)) / num_values
    truth = random_truth(rng, num_images, num_queries)
    ranks = stable_ranks(similarity)
    by_ranking, by_similarity = score_ranking(ranks, truth), score_similarity(similarity, truth)
    for level in CLASSES:
        slow = [slow_scores(ranks[:, query], entry, level) for query, entry in enumerate(truth)]
        used = [scores for scores in slow if scores is not None]
        for name in ("map", "mp@1", "mp@5", "mp@10"):
            expected = np.mean([scores[name] for scores in used]) if used else math.nan
            assert by_ranking[level][name] == pytest.approx(expected, abs=1e-12, nan_ok=True)
            assert by_similarity[level][name] == by_ranking[level][name] or not used


def test_the_three_levels_by_hand():
    """Ranking 0 1 2 ...: easy 1, hard 3, junk 0. Easy: first. Medium: first, third. Hard: second, 0 and 1 ignored."""
    truth = [{"easy": [1], "hard": [3], "junk": [0]}]
    scores = score_ranking(np.arange(12)[:, None], truth)
    assert scores["easy"] == {"map": 1, "mp@1": 1, "mp@5": 1, "mp@10": 1}
    assert scores["medium"]["map"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert scores["medium"]["mp@10"] == pytest.approx(2 / 3)
    assert scores["hard"] == {"map": 0.25, "mp@1": 0, "mp@5": 0.5, "mp@10": 0.5}


def test_junk_may_stand_anywhere_without_changing_the_score():
    rng = np.random.default_rng(0)
    truth = random_truth(rng, 50, 6)
    similarity = rng.normal(size=(6, 50))
    before = score_similarity(similarity, truth)["medium"]
    for query, entry in enumerate(truth):
        similarity[query, entry["junk"]] = rng.normal(size=len(entry["junk"]))
    assert score_similarity(similarity, truth)["medium"] == before


@st.composite
def scores_and_ids(draw):
    width = draw(st.sampled_from([32, 64]))
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=width)
    few = draw(st.lists(numbers, min_size=1, max_size=4))
    scores = draw(st.lists(st.sampled_from(few) | numbers, min_size=1, max_size=40))
    ids = draw(st.lists(st.integers(0, len(scores) - 1), unique=True))
    return np.array(scores, dtype=f"f{width // 8}"), np.array(ids, dtype=np.int64)


LARGEST = np.finfo(np.float64).max


@example((np.array([0, LARGEST, -LARGEST, 1, LARGEST]), np.array([2, 4, 0])), 65536, 65536)
@given(scores_and_ids(), st.sampled_from([1, 7, 65536]), st.sampled_from([4, 16, 65536]))
def test_places_are_those_of_a_stable_sort_for_any_scores(drawn, block, bins):
    """Ties, zeros of both signs, subnormal numbers and the largest there are, in blocks and bins of any size."""
    scores, ids = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_BLOCK", block)
        patch.setattr(ranking, "_BINS", bins)
        found = ranks_of(scores, ids)
    order = np.argsort(-scores, kind="stable").tolist()
    assert found.tolist() == [order.index(i) for i in ids]


def test_places_among_many_cosines_are_those_of_a_stable_sort():
    rng = np.random.default_rng(0)
    scores = rng.normal(0.1, 0.1, 150_000).astype(np.float32)
    assert len(np.unique(scores)) < len(scores)
    ids = rng.choice(len(scores), 300, replace=False)
    places = np.empty(len(scores), dtype=np.int64)
    places[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    np.testing.assert_array_equal(ranks_of(scores, ids), places[ids])


def test_arrays_tensors_and_their_layouts_give_the_same():
    rng = np.random.default_rng(1)
    truth = random_truth(rng, 40, 5)
    half = torch.tensor(rng.normal(size=(5, 40))).to(torch.bfloat16)  # with ties
    expected = score_similarity(half.double().numpy(), truth)
    for similarity in (half, half.float(), half.double(), half.float().T.contiguous().T, half.float().numpy()[:]):
        assert repr(score_similarity(similarity, truth)) == repr(expected)
    ranks = stable_ranks(half.double().numpy())
    for layout in (ranks, torch.tensor(ranks), ranks.astype(np.uint32), np.asfortranarray(ranks)):
        assert repr(score_ranking(layout, truth)) == repr(expected)


def test_distractors_are_columns_after_the_database():
    rng = np.random.default_rng(2)
    names = tuple(f"i{i}" for i in range(20))
    entries = random_truth(rng, 20, 3)
    truth = GroundTruth(names, ("a", "b", "c"), tuple(as_truths(entries, 20)))
    similarity = rng.normal(size=(3, 20))
    alone = score_similarity(similarity, truth)
    assert score_similarity(np.hstack([similarity, np.full((3, 9), -9.0)]), truth) == alone
    worse = score_similarity(np.hstack([similarity, np.full((3, 9), 9.0)]), truth)
    assert worse["medium"]["map"] < alone["medium"]["map"]
    with pytest.raises(DataError, match="19 images were ranked; the database of the ground truth has 20"):
        score_similarity(similarity[:, :19], truth)


def test_similarities_that_cannot_be_ranked_are_refused():
    truth = random_truth(np.random.default_rng(3), 30, 4)
    similarity = np.zeros((4, 30), dtype=np.float32)
    for value in (np.nan, np.inf):
        similarity[2, 11] = value
        with pytest.raises(DataError, match="1 similarities of query 2 are NaN or infinite, first with image 11"):
            score_similarity(similarity, truth)
    with pytest.raises(DataError, match=r"\(4 images, 30 queries\).* the ground truth has 4 queries; is it transposed"):
        score_similarity(np.zeros((30, 4)), [{"easy": [], "hard": [], "junk": []}] * 4)
    with pytest.raises(DataError, match="precision at 10 was asked for in a database of 9 images"):
        score_similarity(np.zeros((1, 9)), [{"easy": [0], "hard": [], "junk": []}])
    with pytest.raises(DataError, match=r"a table \(queries, database\) of numbers"):
        score_similarity(np.zeros(30), truth)


def test_rankings_that_are_not_whole_are_refused():
    truth = random_truth(np.random.default_rng(4), 30, 2)
    ranks = np.stack([np.arange(30), np.arange(30)[::-1]], axis=1)
    for wrong in (0, 30, -1):
        broken = ranks.copy()
        broken[7, 1] = wrong
        with pytest.raises(DataError, match="ranking of query 1 does not hold each of the images 0 to 29 once"):
            score_ranking(broken, truth)
    with pytest.raises(DataError, match="the ranks are float64; they must be integers"):
        score_ranking(ranks.astype(float), truth)
    with pytest.raises(DataError, match="is it transposed"):
        score_ranking(ranks.T, [{"easy": [], "hard": [], "junk": []}] * 2)
