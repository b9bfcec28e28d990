"""Approximate indexes: what they find against brute force, how that is measured, and what is refused."""

import logging
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import each

from patchssl.eval import faiss as faiss_index
from patchssl.eval import search
from patchssl.eval.faiss import IndexPlan
from patchssl.eval.search import Recall, find_neighbors, measure_recall, require_index, search_topk
from patchssl.runtime.errors import UsageError


def clustered(n, d=32, seed=0):
    """Unit vectors around 20 centers that overlap."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(20, d))
    return F.normalize(torch.tensor(centers[rng.integers(0, 20, n)] + rng.normal(size=(n, d))).float())


def brute_force(database, queries, k):
    """Ids of the k largest inner products in double precision, by a full sort."""
    products = queries.double().numpy() @ database.double().numpy().T
    return np.argsort(-products, axis=1, kind="stable")[:, :k]


def share_found(found, right):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), right.tolist(), strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "params", "least", "most"),
    [
        ("IVF16,Flat", "nprobe=16", 1.0, 1.0),  # all clusters are looked into
        ("IVF16,Flat", "nprobe=4", 0.8, 0.9999),
        ("IVF16,Flat", "", 0.2, 0.97),
        ("HNSW16", "efSearch=64", 0.95, 1.0),
        ("HNSW2", "efSearch=1", 0.01, 0.9),
        ("IVF16,PQ16", "nprobe=16", 0.5, 0.95),
        ("IVF16,PQ16,RFlat", "nprobe=16,k_factor_rf=8", 0.97, 1.0),
        ("IVF16,SQ8", "nprobe=16", 0.9, 0.9999),
        ("PCA16,IVF8_HNSW8,PQ8x4fs", "nprobe=8", 0.1, 0.9),
        ("L2norm,Flat", "", 1.0, 1.0),
    ],
)
def test_recall_is_that_of_brute_force(index, params, least, most):
    database, queries = clustered(3000), clustered(150, seed=1)
    found = find_neighbors(database, queries, 10, index=index, search_params=params, recall_at=(1, 10))
    for k in (1, 10):
        expected = share_found(found.ids[:, :k], brute_force(database, queries, k))
        assert found.recall.shares[k] == pytest.approx(expected, abs=1e-9)
    assert least <= found.recall.shares[10] <= most
    assert (found.recall.num_queries, found.recall.seed, found.backend) == (150, 0, "faiss-cpu")
    assert (found.similarities[:, 1:] <= found.similarities[:, :-1]).all()
    assert found.ids.dtype == torch.int64


@pytest.mark.parametrize("index", ["IVF16,Flat", "HNSW16"])
def test_similarities_of_whole_vectors_are_inner_products(index):
    database, queries = 3 * clustered(800), 0.5 * clustered(40, seed=1)
    similarities, ids = search_topk(database, queries, 5, index=index)
    expected = (database[ids] * queries[:, None]).sum(dim=-1)
    torch.testing.assert_close(similarities, expected, atol=1e-5, rtol=1e-5)


def test_recall_by_hand():
    # the two nearest of the first query are 0 and 1, of the second 3 and 2
    database = torch.tensor([[1.0, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]])
    queries = torch.tensor([[1.0, 0.1], [0.1, 1]])
    ids = torch.tensor([[0, 2], [2, -1]])
    assert measure_recall(database, queries, ids, ks=(1, 2)) == Recall({1: 0.5, 2: 0.5}, 2, 0)
    ids = torch.tensor([[1, 0], [3, 2]])
    recall = measure_recall(database, queries, ids, ks=(1, 2), seed=7)
    assert recall == Recall({1: 0.5, 2: 1.0}, 2, 7)
    assert str(recall) == ("50.0% of the 1 nearest, 100.0% of the 2 nearest, measured against exact search on "
                           "2 queries")


def test_a_copy_of_a_neighbor_is_as_good_as_the_neighbor():
    rng = np.random.default_rng(0)
    once = F.normalize(torch.tensor(rng.normal(size=(30, 40))).float())
    database, queries = torch.cat([once, once, once]), once[:10] + 0.1  # 3 are as similar as the first
    ids = brute_force(once, queries, 4)
    nearest = torch.tensor(np.stack([ids[:, 0] + 60, ids[:, 0], ids[:, 0] + 30, ids[:, 1] + 30], axis=1))
    assert measure_recall(database, queries, nearest, ks=(1, 2, 4)).shares == {1: 1.0, 2: 1.0, 4: 1.0}
    others = torch.tensor(ids + rng.choice([0, 30, 60], size=ids.shape))  # the second of them is the fourth nearest
    assert measure_recall(database, queries, others, ks=(1, 3, 4)).shares == {
        1: 1.0, 3: pytest.approx(1 / 3), 4: pytest.approx(2 / 4)}


def test_recall_is_measured_on_a_sample_that_the_seed_draws(monkeypatch):
    database, queries = clustered(500), clustered(300, seed=1)
    right = brute_force(database, queries, 1)[:, 0]
    half = torch.tensor(np.where(np.arange(300) % 2, right, (right + 1) % 500)).unsqueeze(1)
    shares = [measure_recall(database, queries, half, ks=(1,), num_queries=40, seed=seed) for seed in (0, 1, 2, 0)]
    assert shares[0] == shares[3]
    assert len({recall.shares[1] for recall in shares}) > 1
    assert all(0.2 < recall.shares[1] < 0.8 and recall.num_queries == 40 for recall in shares)
    monkeypatch.setattr(search, "RECALL_QUERIES", 25)
    assert find_neighbors(database, queries, 1, index="IVF4,Flat").recall.num_queries <= 300


def test_the_same_seed_gives_the_same_neighbors_and_another_trains_on_others(monkeypatch):
    monkeypatch.setattr(faiss_index, "_LEAST_SAMPLE", 100)
    monkeypatch.setattr(faiss_index, "_VECTORS_PER_CLUSTER", 10)
    database, queries = clustered(2000), clustered(60, seed=1)
    first, again, other = (find_neighbors(database, queries, 20, index="IVF16,Flat", seed=s) for s in (3, 3, 4))
    assert torch.equal(first.ids, again.ids)
    assert first.recall == again.recall
    assert not torch.equal(first.ids, other.ids)


def test_training_takes_a_bounded_sample_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(faiss_index, "_LEAST_SAMPLE", 200)
    monkeypatch.setattr(faiss_index, "_VECTORS_PER_CLUSTER", 40)
    database = clustered(2000)
    with caplog.at_level(logging.INFO):
        search_topk(database, database[:5], 1, index="IVF8,Flat")
        search_topk(database, database[:5], 1, index="SQ8")
        search_topk(database, database[:5], 1, index="IVF100,Flat")
    assert [message for message in caplog.messages if "training" in message] == [
        "training the index IVF8,Flat on 320 of 2000 vectors",
        "training the index SQ8 on 200 of 2000 vectors",
        "training the index IVF100,Flat on 2000 of 2000 vectors",
    ]
    assert "2000 vectors are few to train the 100 clusters of the index IVF100,Flat; 3900 would be enough" \
        in caplog.messages


def test_what_is_not_found_is_minus_one_counts_against_recall_and_is_said(caplog):
    database, queries = clustered(200), clustered(50, seed=1)
    with caplog.at_level(logging.WARNING):
        found = find_neighbors(database, queries, 10, index="IVF20,Flat")
    missing = found.ids < 0
    assert 0 < missing.any(dim=1).sum() < 50
    assert torch.equal(missing, found.similarities == -torch.inf)
    assert (missing[:, 1:] >= missing[:, :-1]).all()  # at the end
    assert (found.ids[missing] == -1).all()
    right = brute_force(database, queries, 10)
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.ids.tolist(), right.tolist(), strict=True))
    assert found.recall.shares == {10: pytest.approx(hits / 500)}
    said = f"found fewer than 10 neighbors for {missing.any(dim=1).sum()} of 50 queries; a higher nprobe"
    assert said in " ".join(caplog.messages)
    whole = find_neighbors(database[:10], queries, 20, index="IVF2,Flat", search_params="nprobe=2", recall_at=(3, 20))
    assert whole.recall.shares == {3: 1.0, 10: 1.0}  # ten are there


def test_progress_counts_vectors_queries_and_the_queries_of_recall(monkeypatch):
    monkeypatch.setattr(faiss_index, "_ADDED_AT_A_TIME", 300)
    monkeypatch.setattr(search, "RECALL_QUERIES", 50)
    calls = []
    find_neighbors(clustered(700), clustered(80, seed=1), 3, index="HNSW8", progress=lambda *call: calls.append(call))
    assert calls == [(300, 830), (600, 830), (700, 830), (780, 830), (830, 830)]


@each(
    ("index", "params", "words"),
    [
        ("IVF4", "", "FAISS says: could not parse index string IVF4"),
        ("flat", "", "FAISS says: could not parse index string flat"),
        ("", "", "could not parse"),
        ("IVF4,PQ7x4", "", "32 dimensions; FAISS says: The dimension of the vector .* should be a multiple"),
        ("OPQ8,IVF4,PQ8x4", "", "'OPQ8,IVF4,PQ8x4' learns a rotation .* 9,984 .* 400 are there"),
        ("LSH", "", "cannot be made for 32 dimensions; FAISS says"),
        ("IVF99999999999999,Flat", "", "sorts vectors into 99,999,999,999,999 clusters, and 400 are there"),
        ("IVF500,Flat", "", "500 clusters, and 400 are there; IVF with about 20 clusters"),
        ("IVF1k,Flat", "", "1,024 clusters"),
        ("IVF4,PQ8x9", "", "512 clusters"),
        ("PQ8x99", "", "clusters, and 400"),
        ("HNSW8_PQ8", "", "for distances only"),
        ("IVF0,Flat", "", "a number that is too small"),
        ("HNSW0", "", "links of a graph .* 2 or more"),
        ("HNSW1", "", "links of a graph"),
        ("IVF4_HNSW1,Flat", "", "links of a graph"),
        ("NSG1", "", "links of a graph"),
        ("PQ8x0", "", "too small"),
        ("RR0,Flat", "", "too small"),
        ("IDMap,Flat", "", "FAISS cannot use the index 'IDMap,Flat' here and says: add does not make sense"),
        ("IVF4,Flat", "nprobe=0", "'nprobe=0' is not NAME=NUMBER"),
        ("IVF4,Flat", "nprobe=-3", "'nprobe=-3' is not NAME=NUMBER"),
        ("IVF4,Flat", "nprobe=99999999999", "is not NAME=NUMBER"),
        ("IVF4,Flat", "nprobe", "'nprobe' is not NAME=NUMBER"),
        ("IVF4,Flat", "efSearch=4", "cannot be set on the index 'IVF4,Flat'; FAISS says: .*efSearch. IVF has nprobe"),
        ("HNSW8", "nprobe=4", "could not set parameter nprobe"),
        ("Flat", "nprobe=4", "has nothing to set; 'nprobe=4' belongs to an approximate index"),
    ],
)
def test_an_index_that_cannot_be_is_refused_in_words(index, params, words):
    database = clustered(400)
    with pytest.raises(UsageError, match=words):
        find_neighbors(database, database[:3], 2, index=index, search_params=params)
    if not index.startswith("IDMap"):  # that one shows when vectors are added
        with pytest.raises(UsageError, match=words):
            require_index(IndexPlan(index, params), 400, 32)


def test_words_of_faiss_come_without_its_source_lines():
    with pytest.raises(UsageError) as error:
        require_index(IndexPlan("IVF4,PQ7x4"), 400, 32)
    assert ".cpp" not in str(error.value)


def test_a_plan_that_suits_is_not_refused():
    for plan in (IndexPlan(), IndexPlan("IVF20,PQ8", "nprobe=4"), IndexPlan("HNSW32", "efSearch=7", "shard", 5)):
        require_index(plan, 400, 32)


@pytest.mark.parametrize(("gpus", "seed", "words"), [("both", 0, "'both' is unknown"), ("one", -1, "seed of -1")])
def test_wrong_gpus_and_seeds_are_refused(gpus, seed, words):
    with pytest.raises(UsageError, match=words):
        find_neighbors(clustered(20), clustered(3), 2, gpus=gpus, seed=seed)


def test_an_approximate_index_needs_faiss(monkeypatch):
    database = clustered(50)
    with pytest.raises(UsageError, match="search by torch is exact: the index 'HNSW8' needs FAISS"):
        search_topk(database, database, 2, index="HNSW8", backend="torch")
    monkeypatch.setitem(sys.modules, "faiss", None)
    for backend in ("auto", "faiss-cpu"):
        with pytest.raises(UsageError, match=r"'HNSW8' needs FAISS, which cannot be imported .*'Flat' is exact"):
            search_topk(database, database, 2, index="HNSW8", backend=backend)
    with pytest.raises(UsageError, match="needs FAISS"):
        require_index(IndexPlan("HNSW8"), 50, 32)


@pytest.mark.parametrize(("params", "level"), [("nprobe=16", logging.INFO), ("", logging.WARNING)])
def test_recall_is_reported_and_a_low_one_with_advice(params, level, caplog):
    with caplog.at_level(logging.INFO):
        recall = find_neighbors(clustered(1000), clustered(60, seed=1), 100, index="IVF16,Flat",
                                search_params=params).recall
    said = caplog.records[-1]
    settings = " with nprobe=16" if params else ""
    assert said.levelno == level
    assert said.getMessage().startswith(f"the index IVF16,Flat{settings} found {recall}")
    assert ("a higher nprobe" in said.getMessage()) == (level == logging.WARNING)
