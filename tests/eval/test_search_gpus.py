"""Search on GPUs, by FAISS as it is but for its GPUs: their indexes are copies in memory, and what is asked is kept."""

import logging
import sys
from types import SimpleNamespace

import faiss
import pytest
import torch
import torch.nn.functional as F

from patchssl.eval import backends
from patchssl.eval import faiss as faiss_index
from patchssl.eval.faiss import IndexPlan
from patchssl.eval.search import describe_backend, find_neighbors, search_topk
from patchssl.runtime.errors import UsageError

MIB = 2**20


def some_features(n, d=24, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


class Resources:
    def setTempMemory(self, size):  # noqa: N802
        self.temporary = size


class Full:
    """An index that takes vectors in, and has no memory left to search."""

    def add(self, vectors):
        pass

    def search(self, queries, k):
        raise RuntimeError("out of temporary memory")


class FakeGpuFaiss:
    """A GPU build of FAISS that sees `gpus` GPUs; `broken` is what they fail with, `full` ones fail in the search."""

    __version__ = "9.9"
    StandardGpuResources = Resources
    GpuMultipleClonerOptions = SimpleNamespace

    def __init__(self, gpus=1, broken=None, full=False):
        self.gpus, self.broken, self.full, self.log = gpus, broken, full, []

    def __getattr__(self, name):
        return getattr(faiss, name)

    def get_num_gpus(self):
        return self.gpus

    def index_cpu_to_gpu_multiple_py(self, resources, index, options, gpus):
        if self.broken:
            raise RuntimeError(self.broken)
        if self.full:
            return Full()
        assert (index.is_trained, index.ntotal) == (True, 0)
        self.log.append((list(gpus), [one.temporary for one in resources], options))
        if len(gpus) == 1:
            return faiss.clone_index(index)
        if options.shard:  # of flat indexes the ids follow each other, as in FAISS's GpuCloner.cpp
            whole = faiss.IndexShards(index.d, True, isinstance(index, faiss.IndexFlat))
        else:
            whole = faiss.IndexReplicas(index.d)
        for _ in gpus:
            (whole.add_shard if options.shard else whole.addIndex)(faiss.clone_index(index))
        return whole

    def knn(self, *args, **options):
        self.log.append("cpu")
        return faiss.knn(*args, **options)


@pytest.fixture
def one_gpu(monkeypatch):
    return install(monkeypatch, FakeGpuFaiss())


@pytest.fixture
def three_gpus(monkeypatch):
    return install(monkeypatch, FakeGpuFaiss(gpus=3))


def install(monkeypatch, fake):
    monkeypatch.setitem(sys.modules, "faiss", fake)
    return fake


def test_a_gpu_build_that_sees_a_gpu_is_used_only_where_a_gpu_was_asked_for(one_gpu):
    database = some_features(50)
    assert search_topk(database, database[:3], 1, device="cuda:1")[1].flatten().tolist() == [0, 1, 2]
    assert search_topk(database, database[:3], 1, backend="faiss-gpu")[1].flatten().tolist() == [0, 1, 2]
    assert [call[:2] for call in one_gpu.log] == [([1], [256 * MIB]), ([0], [256 * MIB])]
    assert not any(call[2].useFloat16 for call in one_gpu.log)
    search_topk(database, database[:3], 1, device="cpu")
    assert one_gpu.log[2:] == ["cpu"]
    assert describe_backend("cuda").startswith("faiss-gpu (FAISS 9.9, GPU build that sees 1 GPUs")


@pytest.mark.parametrize("gpus", ["shard", "replicate"])
@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ8x4", "PCA12,IVF4,Flat"])
def test_several_gpus_give_the_neighbors_of_one(gpus, index, three_gpus):
    database, queries = some_features(700), some_features(70, seed=1)
    settings = {"device": "cuda", "index": index, "search_params": "" if index == "Flat" else "nprobe=3"}
    several = find_neighbors(database, queries, 12, gpus=gpus, **settings)
    places, temporary, options = three_gpus.log[0]
    assert (places, temporary, options.shard) == ([0, 1, 2], [256 * MIB] * 3, gpus == "shard")
    assert several.backend == f"faiss-gpu ({gpus}, 3 GPUs)"
    one = find_neighbors(database, queries, 12, **settings)
    assert three_gpus.log[-1 if index == "Flat" else -2][0] == [0]
    assert torch.equal(several.ids, one.ids)
    torch.testing.assert_close(several.similarities, one.similarities)
    on_cpu = find_neighbors(database, queries, 12, **{**settings, "device": "cpu"})
    assert torch.equal(several.ids, on_cpu.ids)
    assert several.recall == on_cpu.recall


def test_exact_search_on_a_gpu_counts_queries_alone_as_on_the_cpu(one_gpu):
    database, calls = some_features(50), []
    for device in ("cuda", "cpu"):
        find_neighbors(database, database[:7], 1, device=device, progress=lambda *call: calls.append(call))
    assert calls == [(7, 7), (7, 7)]


@pytest.mark.parametrize(("index", "half"), [("IVF2,PQ48x4", False), ("IVF2,PQ56x4", True), ("Flat", False)])
def test_tables_too_long_for_a_gpu_are_held_in_half_precision(index, half, one_gpu):
    database = some_features(100, 336)
    find_neighbors(database, database[:5], 3, device="cuda", index=index)
    assert one_gpu.log[0][2].useFloat16 is half


def test_an_index_without_a_form_for_gpus_is_searched_on_the_cpu_and_said_so(one_gpu, caplog):
    database = some_features(300)
    with caplog.at_level(logging.WARNING):
        found = find_neighbors(database, database[:5], 3, device="cuda", index="HNSW16")
    assert found.backend == "faiss-cpu"
    assert found.ids[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert caplog.messages == ["the index HNSW16 is searched on the CPU: FAISS has no form of IndexHNSWFlat for GPUs"]
    with pytest.raises(UsageError, match=r"'HNSW16' cannot be searched on a GPU: .*'auto' searches it on the CPU"):
        find_neighbors(database, database[:5], 3, backend="faiss-gpu", index="HNSW16")
    with pytest.raises(UsageError, match="finds 2048 neighbors at most on a GPU, not 2049"):
        find_neighbors(some_features(3000), database[:5], 2049, backend="faiss-gpu", index="IVF4,Flat")


def test_an_index_for_gpus_without_any_is_searched_on_the_cpu_and_said_so(monkeypatch, caplog):
    install(monkeypatch, FakeGpuFaiss(gpus=0))
    database = some_features(300)
    with caplog.at_level(logging.WARNING):
        found = find_neighbors(database, database[:5], 3, device="cuda", index="IVF2,Flat", gpus="shard",
                               search_params="nprobe=2")
    assert (found.backend, found.recall.shares) == ("faiss-cpu", {3: 1.0})
    assert caplog.messages[:2] == ["the index IVF2,Flat is searched on the CPU: FAISS 9.9 sees no GPU",
                                   "'shard' over several GPUs is left out: the search is by faiss-cpu"]


def test_a_search_that_fails_on_the_gpu_goes_on_elsewhere_and_says_so(monkeypatch, caplog):
    fake = install(monkeypatch, FakeGpuFaiss(broken="no kernel image is available\nat somewhere"))
    monkeypatch.setattr(backends, "_open_torch", out_of_memory)
    database = some_features(50)
    with caplog.at_level(logging.WARNING):
        ids = search_topk(database, database[:3], 1, device="cuda")[1]
    assert ids.flatten().tolist() == [0, 1, 2]
    assert fake.log == ["cpu"]
    assert caplog.messages == [
        "search by faiss-gpu failed (no kernel image is available); going on with torch on cuda",
        "search by torch on cuda failed (out of memory); going on with faiss-cpu",
    ]
    with pytest.raises(RuntimeError, match="no kernel image"):
        search_topk(database, database[:3], 1, device="cuda", backend="faiss-gpu")


@pytest.mark.parametrize("fault", [{"broken": "7 bytes per vector are not supported"}, {"full": True}])
def test_an_index_that_fails_on_the_gpu_goes_on_with_the_cpu_and_says_so(fault, monkeypatch, caplog):
    install(monkeypatch, FakeGpuFaiss(**fault))
    database, calls = some_features(700, 28), []
    with caplog.at_level(logging.WARNING):
        found = find_neighbors(database, database[:40], 3, device="cuda", index="IVF2,PQ7x4",
                               search_params="nprobe=2", progress=lambda *call: calls.append(call))
    assert found.backend == "faiss-cpu"
    reason = fault.get("broken", "out of temporary memory")
    assert caplog.messages[0] == f"search by faiss-gpu failed ({reason}); going on with faiss-cpu"
    assert calls[-3:] == [(700, 780), (740, 780), (780, 780)]


def out_of_memory(*_, **__):
    raise RuntimeError("out of memory")


def test_more_neighbors_than_faiss_finds_on_a_gpu_are_left_to_torch(one_gpu):
    names = [name for name, _ in backends.attempts_for(torch.device("cuda"), "auto", 2049, IndexPlan(), (3000, 4))]
    assert names == ["torch on cuda", "faiss-cpu"]
    with pytest.raises(UsageError, match="finds 2048 at most"):
        search_topk(some_features(3000, 4), some_features(2, 4), 2049, backend="faiss-gpu")


def test_the_gpu_forms_are_classes_that_faiss_has():
    assert all(hasattr(faiss, name) for name in faiss_index._GPU_FORMS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gpus", ["one", "shard", "replicate"])
@pytest.mark.parametrize("index", ["Flat", "IVF8,Flat", "IVF8,PQ8"])
def test_real_gpus_find_what_the_cpu_finds(gpus, index):
    database, queries = some_features(3000), some_features(200, seed=1)
    settings = {"index": index, "search_params": "" if index == "Flat" else "nprobe=4", "gpus": gpus}
    expected = find_neighbors(database, queries, 20, **settings)
    found = find_neighbors(database, queries, 20, device="cuda", **settings)
    assert (found.ids == expected.ids).float().mean() > (0.999 if index == "Flat" else 0.95)
    torch.testing.assert_close(found.similarities, expected.similarities, atol=1e-2, rtol=1e-2)
