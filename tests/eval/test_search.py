import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import each

from patchssl.eval import backends, search
from patchssl.eval import database as vectors
from patchssl.eval import faiss as faiss_index
from patchssl.eval.search import describe_backend, faiss_version, find_neighbors, search_topk
from patchssl.runtime.errors import DataError, UsageError

BACKENDS = ("faiss-cpu", "torch")


def some_features(n, d=24, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)


@each("backend", BACKENDS)
@each("k", [1, 7, 150])
def test_neighbors_equal_those_of_a_full_sort_in_double_precision(backend, k):
    database, queries = some_features(500), some_features(300, seed=1)
    similarities, ids = search_topk(database, queries, k, backend=backend)
    full = queries.numpy().astype(np.float64) @ database.numpy().astype(np.float64).T
    expected = -np.sort(-full, axis=1)[:, :k]
    assert np.allclose(similarities, expected, atol=1e-6)
    # neighbors whose cosines differ by less than float32 can tell may change places
    assert np.allclose(np.take_along_axis(full, ids.numpy(), 1), expected, atol=1e-6)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert similarities.dtype == torch.float32
    assert ids.dtype == torch.int64


@each("backend", BACKENDS)
@each("cosine", [False, True])
def test_the_search_is_the_same_when_database_and_queries_span_several_blocks(backend, cosine, monkeypatch):
    database, queries = some_features(500) * torch.rand(500, 1), some_features(70, seed=1)
    options = {"backend": backend, "cosine": cosine}
    whole = search_topk(database, queries, 30, **options)
    monkeypatch.setattr(backends, "_SIMILARITIES", 16 * 12)
    monkeypatch.setattr(vectors, "_BLOCK_BYTES", 12 * 4 * 24)  # fewer rows than k: the first blocks give less than k
    calls = []
    blocks = search_topk(database, queries, 30, **options, progress=lambda *call: calls.append(call))
    assert torch.equal(whole[1], blocks[1])
    torch.testing.assert_close(whole[0], blocks[0])
    assert len(calls) == 42  # told after every block
    assert calls[-1] == (70, 70)
    assert calls == sorted(calls)


@each("backend", BACKENDS)
def test_cosines_are_inner_products_of_rows_divided_by_their_norms_and_nothing_given_is_changed(backend):
    database, queries = torch.randn(300, 8) * torch.rand(300, 1) * 9, torch.randn(20, 8)
    before = database.clone()
    found = search_topk(database, queries, 5, backend=backend, cosine=True)
    rows, asked = database.double().numpy(), queries.double().numpy()
    full = (asked / np.linalg.norm(asked, axis=1)[:, None]) @ (rows / np.linalg.norm(rows, axis=1)[:, None]).T
    assert np.allclose(found[0], -np.sort(-full, axis=1)[:, :5], atol=1e-6)
    assert torch.equal(database, before)


def test_faiss_multiplies_matrices_however_few_the_queries_and_its_setting_is_put_back(monkeypatch):
    faiss, _ = faiss_index.import_faiss()
    before, seen, real = faiss.cvar.distance_compute_blas_threshold, [], faiss.knn

    def watched(*args, **options):
        seen.append(faiss.cvar.distance_compute_blas_threshold)
        return real(*args, **options)

    monkeypatch.setattr(faiss, "knn", watched)
    search_topk(some_features(500), some_features(30, seed=1), 3, backend="faiss-cpu")
    assert seen == [1]
    assert faiss.cvar.distance_compute_blas_threshold == before


IN_LITTLE_MEMORY = """
import torch
from patchssl.eval.knn import knn_scores

def number(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 2**20

def some(count):
    return torch.empty(count, 384).uniform_(-1, 1)

train, labels = some(800_000), torch.arange(800_000) % 10
test, asked = some(64), torch.arange(64) % 10
knn_scores(train[:5000], labels[:5000], test, asked)
open("/proc/self/clear_refs", "w").write("5")
before = number("VmRSS")
knn_scores(train, labels, test, asked)
print(number("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux")
def test_k_nn_needs_little_memory_beside_the_features():
    """800,000 x 384 are 1.2 GB: dividing them, or asking which are finite, all at once would take as much again."""
    done = subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY], check=False, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3  # GiB



@pytest.mark.parametrize("backend", BACKENDS)
def test_inner_products_are_not_normalized(backend):
    similarities, ids = search_topk(torch.tensor([[3.0, 0], [0, 1]]), torch.tensor([[2.0, 1]]), 2, backend=backend)
    assert similarities.tolist() == [[6.0, 1.0]]
    assert ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_neighbors_the_lower_id_comes_first(backend):
    # exact in float32, whatever the order of summation
    vectors = torch.eye(4)
    database = vectors[torch.tensor([1, 0, 2, 0, 1, 0, 3, 1])]
    queries = torch.tensor([[1.0, 0.5, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]])
    similarities, ids = search_topk(database, queries, 8, backend=backend)
    assert ids.tolist() == [[1, 3, 5, 0, 4, 7, 2, 6], [2, 0, 1, 3, 4, 5, 6, 7], [0, 4, 7, 1, 2, 3, 5, 6]]
    assert similarities[0].tolist() == [1, 1, 1, 0.5, 0.5, 0.5, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_neighbors_than_the_database_holds_are_all_of_it(backend):
    similarities, ids = search_topk(some_features(3), some_features(2, seed=1), 20, backend=backend)
    assert similarities.shape == ids.shape == (2, 3)
    assert ids.sort(dim=1).values.tolist() == [[0, 1, 2]] * 2


def test_numpy_half_precision_and_strided_features_are_read():
    database = some_features(40, 8)
    expected = search_topk(database, database[:5], 3)[1]
    assert torch.equal(search_topk(database.numpy(), database.numpy()[:5], 3)[1], expected)
    assert torch.equal(search_topk(database.T.contiguous().T, database[:5].double(), 3)[1], expected)
    assert search_topk(database.bfloat16(), database[:5].half(), 3)[0].dtype == torch.float32


def test_without_faiss_torch_gives_the_same_neighbors(monkeypatch):
    database, queries = some_features(200), some_features(50, seed=1)
    by_faiss = search_topk(database, queries, 20, backend="faiss-cpu")
    without_faiss(monkeypatch)
    by_torch = search_topk(database, queries, 20)
    assert torch.equal(by_faiss[1], by_torch[1])
    torch.testing.assert_close(by_faiss[0], by_torch[0])
    assert faiss_version() is None
    assert describe_backend().startswith("torch on cpu, because FAISS cannot be imported")
    with pytest.raises(UsageError, match="needs FAISS"):
        search_topk(database, queries, 1, backend="faiss-cpu")


def test_with_faiss_it_is_used_on_the_cpu():
    assert describe_backend("cpu").startswith("faiss-cpu (FAISS 1.")
    assert faiss_version()


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_come_in_batches_that_do_not_show_but_in_the_progress(backend, monkeypatch):
    database, queries = some_features(500), some_features(90, seed=1)
    whole = find_neighbors(database, queries, 30, backend=backend)
    monkeypatch.setattr(search, "_LEAST_QUERIES", 16)
    monkeypatch.setattr(search, "_PRODUCTS_PER_BATCH", database.numel() * 20)
    calls = []
    parts = find_neighbors(database, queries, 30, backend=backend, progress=lambda *call: calls.append(call))
    assert calls == [(18, 90), (36, 90), (54, 90), (72, 90), (90, 90)]
    assert torch.equal(whole.ids, parts.ids)
    torch.testing.assert_close(whole.similarities, parts.similarities)
    assert whole.backend == ("faiss-cpu" if backend == "faiss-cpu" else "torch on cpu")
    assert whole.recall is parts.recall is None


def test_a_search_can_be_interrupted_between_batches(monkeypatch):
    monkeypatch.setattr(search, "_LEAST_QUERIES", 10)
    monkeypatch.setattr(search, "_PRODUCTS_PER_BATCH", 1)
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_topk(some_features(50), some_features(50, seed=1), 3, progress=interrupt)
    assert calls == [10, 20]


def test_a_wrong_search_is_refused_in_words():
    good = some_features(5)
    with pytest.raises(UsageError, match="did you mean 'faiss-cpu'"):
        search_topk(good, good, 1, backend="faiss_cpu")
    with pytest.raises(UsageError, match="at least 1"):
        search_topk(good, good, 0)
    with pytest.raises(UsageError, match=r"recall at \[6\] cannot be measured on 5"):
        search_topk(good, good, 5, recall_at=[6])
    with pytest.raises(DataError, match="queries have 7 dimensions, the database has 24"):
        search_topk(good, some_features(5, 7), 1)
    with pytest.raises(DataError, match=r"database features have the shape \(0, 24\)"):
        search_topk(good[:0], good, 1)
    broken = good.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(DataError, match="1 of the 5 queries features hold NaN or infinity, first in row 3"):
        search_topk(good, broken, 1)


def test_openblas_is_told_the_processor_only_while_faiss_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    with faiss_index._openblas_core():
        assert faiss_index.os.environ["OPENBLAS_CORETYPE"] == "Haswell"
    assert "OPENBLAS_CORETYPE" not in faiss_index.os.environ
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    with faiss_index._openblas_core():
        assert faiss_index.os.environ["OPENBLAS_CORETYPE"] == "Zen"
    assert faiss_index.os.environ["OPENBLAS_CORETYPE"] == "Zen"


def test_faiss_searches_beside_torch_threads_of_another_openmp():
    """A search between, after and beside threaded torch work ends, and is right."""
    import faiss

    threads = torch.get_num_threads()
    features = some_features(4000, 64)
    matrix = torch.randn(600, 600)
    try:
        for count in (2, 1, 2):
            torch.set_num_threads(count)
            matrix @ matrix
            before = faiss.omp_get_max_threads()
            ids = search_topk(features, features[:500], 1, backend="faiss-cpu")[1]
            assert ids.flatten().tolist() == list(range(500))
            assert faiss.omp_get_max_threads() == before
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(search_topk, features, features[:300], 1, backend="faiss-cpu")
            product = matrix @ matrix
            assert found.result(timeout=60)[1].flatten().tolist() == list(range(300))
            torch.testing.assert_close(product, (matrix.double() @ matrix.double()).float(), atol=1e-3, rtol=1e-3)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_neighbors_of_the_cpu():
    database, queries = some_features(3000), some_features(200, seed=1)
    expected = search_topk(database, queries, 20, backend="torch")
    for backend in ("auto", "torch"):
        similarities, ids = search_topk(database, queries, 20, device="cuda", backend=backend)
        assert (ids == expected[1]).float().mean() > 0.999
        torch.testing.assert_close(similarities, expected[0], atol=1e-5, rtol=1e-5)
