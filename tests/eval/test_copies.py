import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchssl.eval.metrics import average_precision, micro_average_precision, score_neighbors
from patchssl.runtime.errors import DataError

OFFICIAL = json.loads((Path(__file__).parents[1] / "data" / "copydays_official.json").read_text())


def neighbors_of(similarity, k):
    ids = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, ids, 1), ids


def score(similarity, originals, blocks, num_ranks=20):
    return score_neighbors(*neighbors_of(similarity, num_ranks), originals, blocks)


@pytest.mark.parametrize("num_ranks", OFFICIAL["expected"])
def test_scores_equal_what_the_official_codes_answered(num_ranks):
    expected = dict(OFFICIAL["expected"][num_ranks])
    aps = expected.pop("aps")
    scores = score(np.array(OFFICIAL["similarity"]), np.array(OFFICIAL["originals"]), OFFICIAL["blocks"],
                   int(num_ranks))
    assert scores.metrics == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(np.concatenate(list(scores.aps.values())), aps, atol=1e-12)
    assert {name: len(values) for name, values in scores.aps.items()} == OFFICIAL["blocks"]


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 20), st.integers(1, 25), st.sampled_from([2, 10**6]))
def test_scores_equal_those_of_sorted_results(seed, num_queries, num_images, num_ranks, num_values):
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, num_values, (num_queries, num_images)).astype(np.float32)
    originals = rng.integers(0, num_images, num_queries)
    first = int(rng.integers(0, num_queries)) if num_queries > 1 else 0
    blocks = {"original": first, "strong": num_queries - first} if first else {"strong": num_queries}
    values, ids = neighbors_of(similarity, num_ranks)
    correct = ids == originals[:, None]
    aps = [average_precision(np.flatnonzero(row), 1) for row in correct]
    expected = {f"{name}/map": float(np.mean(part))
                for name, part in zip(blocks, np.split(aps, [first]) if first else [aps], strict=True)}
    expected["overall/muap"] = micro_average_precision(values, correct, num_queries)
    assert score_neighbors(values, ids, originals, blocks).metrics == pytest.approx(expected)


def test_scores_by_hand():
    """Originals 0 and 1, distractor 2; the copies find theirs at ranks 1, 2 and 3."""
    similarity = np.array([[0.9, 0.1, 0.0], [0.3, 0.4, 0.5], [0.8, 0.6, 0.7]])
    scores = score(similarity, np.array([0, 1, 1]), {"strong": 3})
    assert scores.aps["strong"].tolist() == pytest.approx([1, 1 / 4, 1 / 6])
    # together: 0.9 right, 0.8, 0.7 wrong, 0.6 right, 0.5 wrong, 0.4 right
    assert scores.metrics["overall/muap"] == pytest.approx(average_precision([0, 3, 5], 3))
    assert score(similarity, np.array([0, 1, 1]), {"strong": 3}, 2).aps["strong"][2] == 0


def test_a_network_that_sees_no_difference_earns_next_to_nothing():
    similarity = np.ones((50, 400))
    scores = score(similarity, np.arange(50), {"original": 50})
    assert scores.metrics["original/map"] < 0.05  # the ids below 20 by their order
    assert scores.metrics["overall/muap"] < 0.01


def test_the_order_of_queries_within_a_block_does_not_matter():
    rng = np.random.default_rng(0)
    similarity, originals = rng.integers(0, 5, (30, 20)), rng.integers(0, 20, 30)
    order = rng.permutation(30)
    one, other = (score(similarity[i], originals[i], {"strong": 30}) for i in (np.arange(30), order))
    assert one.metrics == pytest.approx(other.metrics)
    np.testing.assert_array_equal(one.aps["strong"][order], other.aps["strong"])


def test_tensors_are_scored_as_arrays_are():
    rng = np.random.default_rng(1)
    values, ids = neighbors_of(rng.normal(size=(30, 40)), 20)
    originals, blocks = rng.integers(0, 40, 30), {"a": 10, "b": 20}
    assert score_neighbors(torch.tensor(values), torch.tensor(ids), originals, blocks).metrics \
        == score_neighbors(values, ids, originals, blocks).metrics


def test_what_cannot_be_scored_is_refused():
    similarity, originals = np.zeros((4, 9)), np.arange(4)
    with pytest.raises(DataError, match="4 queries cannot be split into blocks of original 2, strong 1"):
        score(similarity, originals, {"original": 2, "strong": 1})
    with pytest.raises(DataError, match="cannot be split into blocks of original 0, strong 4"):
        score(similarity, originals, {"original": 0, "strong": 4})
    with pytest.raises(DataError, match="4 queries need one integer each"):
        score(similarity, originals[1:], {"strong": 4})
    with pytest.raises(DataError, match="ids from 0 on, these begin with -1"):
        score(similarity, originals - 1, {"strong": 4})
    values, ids = neighbors_of(similarity, 3)
    with pytest.raises(DataError, match="one finite similarity each, in falling order"):
        score_neighbors(values + np.array([0, 1, 0]), ids, originals, {"strong": 4})
    with pytest.raises(DataError, match="one finite similarity each"):
        score_neighbors(values, ids[:, :2], originals, {"strong": 4})
    similarity[3, 3] = np.nan
    with pytest.raises(DataError, match="one finite similarity each"):
        score(similarity, originals, {"strong": 4})
