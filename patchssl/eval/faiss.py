"""The only file that names FAISS: its import, exact search, and indexes from a factory string, on CPU and GPUs.

What is made here is a `Searcher`: a function from a batch of queries to their neighbors. A plan that cannot work
is refused in words before anything is computed: FAISS itself ends the process, or never ends, on some of them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchssl.eval.database import Database, Told, nearest_by_blocks
from patchssl.runtime.errors import UsageError, unknown_choice

GPUS = ("one", "shard", "replicate")
MAX_K_GPU = 2048
_GPU_TEMPORARY_BYTES = 256 * 2**20  # on every GPU
_GPU_FORMS = ("IndexFlat", "IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer")
_MAX_FLOAT32_TABLES = 48  # sub-quantizers whose tables fit into a GPU's shared memory in float32
_VECTORS_PER_CLUSTER = 256  # FAISS leaves out what is more
_ENOUGH_PER_CLUSTER = 39  # FAISS warns below
_LEAST_SAMPLE = 65536
_ADDED_AT_A_TIME = 8192

log = logging.getLogger(__name__)

# queries (Q, D), and whom to tell of those that are done -> similarities and ids (Q, k) on the CPU
Searcher = Callable[[Tensor, Told], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class IndexPlan:
    """A FAISS factory string, what is set on the index, how several GPUs share it, and the seed of samples."""

    index: str = "Flat"
    search_params: str = ""  # as in "nprobe=16,quantizer_efSearch=32"
    gpus: str = "one"
    seed: int = 0

    @property
    def exact(self) -> bool:
        """Whether every neighbor is found by comparing with all vectors."""
        return self.index == "Flat"


def import_faiss() -> tuple[Any, str]:
    """FAISS and "", or None and the reason why it cannot be imported."""
    try:
        with _openblas_core():
            return importlib.import_module("faiss"), ""
    except ImportError as error:
        return None, str(error)


def num_gpus(faiss: Any) -> int:
    """How many GPUs this build of FAISS can use."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def require_plan(plan: IndexPlan, num_vectors: int) -> None:
    """UsageError for a plan that says in itself, without FAISS, that `num_vectors` cannot be searched by it."""
    if plan.gpus not in GPUS:
        raise UsageError(unknown_choice("use of several GPUs", plan.gpus, GPUS))
    if plan.seed < 0:
        raise UsageError(f"a seed of {plan.seed} draws no sample; it must be 0 or more")
    for setting in filter(None, plan.search_params.split(",")):
        if not re.fullmatch(r" *[A-Za-z]\w*=0*[1-9]\d{0,8} *", setting, re.ASCII):
            raise UsageError(f"the search setting '{setting}' is not NAME=NUMBER with a whole number above 0, "
                             "as in nprobe=16 or efSearch=64")
    if plan.exact and plan.search_params:
        raise UsageError(f"the index 'Flat' compares with all vectors and has nothing to set; '{plan.search_params}' "
                         "belongs to an approximate index such as IVF1024,PQ48")
    numbers = [int(number) for number in re.findall(r"\d+", plan.index)]
    links = [int(number) for number in re.findall(r"(?:HNSW|NSG)(\d+)", plan.index)]
    if 0 in numbers or 1 in links:
        raise UsageError(f"the index '{plan.index}' holds a number that is too small: parts and clusters are 1 "
                         "or more, links of a graph (HNSW) 2 or more")
    clusters = _clusters_named(plan.index)
    if clusters > num_vectors:
        raise UsageError(f"the index '{plan.index}' sorts vectors into {clusters:,} clusters, and {num_vectors:,} "
                         f"are there; IVF with about {max(1, round(num_vectors**0.5)):,} clusters suits them, PQ "
                         "needs 256, and Flat is exact")
    if "OPQ" in plan.index and num_vectors < _ENOUGH_PER_CLUSTER * 256:  # and FAISS warns hundreds of times
        raise UsageError(f"the index '{plan.index}' learns a rotation from {_ENOUGH_PER_CLUSTER * 256:,} vectors or "
                         f"more, and {num_vectors:,} are there; without OPQ it needs none")


def make_index(faiss: Any, plan: IndexPlan, dimensions: int, num_vectors: int) -> Any:
    """FAISS's index of `plan` for the inner product, empty, with its settings; UsageError says what FAISS says."""
    require_plan(plan, num_vectors)
    try:
        index = faiss.index_factory(dimensions, plan.index, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, MemoryError) as error:
        raise UsageError(f"the index '{plan.index}' cannot be made for {dimensions} dimensions; FAISS says: "
                         f"{faiss_words(error)}. Flat, IVF1024,PQ48 and HNSW32 are examples that FAISS knows") from None
    if {index.metric_type, _core(faiss, index).metric_type} != {faiss.METRIC_INNER_PRODUCT}:
        raise UsageError(f"FAISS has the index '{plan.index}' for distances only, and similarities are inner "
                         "products here; HNSW32 and IVF1024,PQ48 have them")
    try:
        faiss.ParameterSpace().set_index_parameters(index, plan.search_params)
    except RuntimeError as error:
        raise UsageError(f"'{plan.search_params}' cannot be set on the index '{plan.index}'; FAISS says: "
                         f"{faiss_words(error)}. IVF has nprobe, HNSW has efSearch") from None
    return index


def gpu_obstacle(faiss: Any, index: Any, k: int) -> str:
    """Why GPUs cannot search `index` for `k` neighbors, in words; "" if nothing speaks against it."""
    if not num_gpus(faiss):
        return f"FAISS {faiss.__version__} sees no GPU"
    if k > MAX_K_GPU:
        return f"FAISS finds {MAX_K_GPU} neighbors at most on a GPU, not {k}"
    while type(index).__name__ == "IndexPreTransform":
        index = faiss.downcast_index(index.index)
    if type(index).__name__ not in _GPU_FORMS:
        return f"FAISS has no form of {type(index).__name__} for GPUs"
    return ""


def open_exact(faiss: Any, database: Database, k: int, added: Told) -> Searcher:
    """The search of IndexFlatIP on the CPU, without the index's copy of `database` (N, D)."""

    def nearest(queries: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        wanted = min(k, len(block))
        found = faiss.knn(queries.numpy(), block.cpu().numpy(), wanted, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def search(queries: Tensor, told: Told) -> tuple[Tensor, Tensor]:
        with _torch_threads(faiss), _matrix_products(faiss):
            return nearest_by_blocks(database, queries.cpu(), k, nearest, told)

    return search


def open_on_cpu(faiss: Any, plan: IndexPlan, database: Database, k: int, added: Told) -> Searcher:
    """An approximate index of `database` (N, D) on the CPU; UsageError where FAISS cannot build or search it."""
    with _torch_threads(faiss), _in_words(plan):
        index = _trained(faiss, plan, database)
        for _, block in database.blocks(_ADDED_AT_A_TIME):
            index.add(block.cpu().numpy())
            added(len(block))

    def search(queries: Tensor, told: Told) -> tuple[Tensor, Tensor]:
        with _torch_threads(faiss), _in_words(plan):
            return _search(index, queries, k, told)

    return search


def open_on_gpus(faiss: Any, gpu: int, plan: IndexPlan, database: Database, k: int, added: Told) -> Searcher:
    """The index of `plan` for `database` (N, D) on GPU `gpu`, or cut over or copied to all; temporary memory bounded.

    Trained on the CPU and moved while it is empty, so that no vector is held twice. RuntimeError where a GPU fails.
    """
    with _torch_threads(faiss):
        on_cpu = _trained(faiss, plan, database)
    places = [gpu] if plan.gpus == "one" else list(range(num_gpus(faiss)))
    resources = [_resources(faiss) for _ in places]
    options = faiss.GpuMultipleClonerOptions()
    options.shard = plan.gpus == "shard"
    quantizer = getattr(_core(faiss, on_cpu), "pq", None)
    options.useFloat16 = quantizer is not None and quantizer.M > _MAX_FLOAT32_TABLES  # of the tables, not of vectors
    index = faiss.index_cpu_to_gpu_multiple_py(resources, on_cpu, options, places)
    index.add(database.rows(slice(None)).cpu().numpy())  # all at once: shards of Flat take no second part
    if not plan.exact:  # exact search counts queries alone
        added(len(database))
    return lambda queries, told: _search(index, queries, k, told)


def faiss_words(error: BaseException) -> str:
    """FAISS's own sentence, without the C++ function and line that it stands behind.

    >>> faiss_words(RuntimeError("Error in void f() at /x/y.cpp:64: Error: '!(d % M == 0)' failed: M must divide d"))
    'M must divide d'
    """
    text = re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).strip(), flags=re.DOTALL)
    return " ".join(re.sub(r"^Error: '.*' failed: ", "", text).split()) or type(error).__name__


def _resources(faiss: Any) -> Any:
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_GPU_TEMPORARY_BYTES)
    return resources


def _search(index: Any, queries: Tensor, k: int, told: Told) -> tuple[Tensor, Tensor]:
    """Similarities and ids (Q, k); where too few were found, -infinity and -1."""
    found = index.search(queries.cpu().numpy(), k)
    similarities, ids = torch.from_numpy(found[0]), torch.from_numpy(found[1])
    told(len(queries))
    return similarities.masked_fill_(ids < 0, -torch.inf), ids


def _trained(faiss: Any, plan: IndexPlan, vectors: Database) -> Any:
    """The empty index of `plan`, trained on a sample of `vectors` that the seed draws."""
    index = make_index(faiss, plan, vectors.dimensions, len(vectors))
    core = _core(faiss, index)
    quantizer = getattr(core, "pq", None)
    clusters = max(getattr(core, "nlist", 1), quantizer.ksub if quantizer is not None else 1)
    if index.is_trained:
        return index
    for part in filter(None, (core, quantizer)):
        if hasattr(part, "cp"):
            part.cp.min_points_per_centroid = 1  # said once, below
    if hasattr(core, "do_polysemous_training"):  # renumbers centroids for the setting ht alone, for minutes
        core.do_polysemous_training = re.search(r"\bht=", plan.search_params) is not None
    if len(vectors) < _ENOUGH_PER_CLUSTER * clusters:
        log.warning("%d vectors are few to train the %d clusters of the index %s; %d would be enough",
                    len(vectors), clusters, plan.index, _ENOUGH_PER_CLUSTER * clusters)
    count = min(len(vectors), max(_LEAST_SAMPLE, _VECTORS_PER_CLUSTER * clusters))
    log.info("training the index %s on %d of %d vectors", plan.index, count, len(vectors))
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(plan.seed))[:count].sort().values
    index.train(vectors.rows(chosen).cpu().numpy())
    return index


def _core(faiss: Any, index: Any) -> Any:
    """The index inside transformations of the vectors and re-ranking."""
    while (inner := getattr(index, "base_index", None) or getattr(index, "index", None)) is not None:
        index = faiss.downcast_index(inner)
    return index


def _clusters_named(factory: str) -> int:
    """The most clusters that a factory string asks for: IVF4k has 4096, PQ8x10 has 2^10, PQ8 has 256."""
    factors = {"": 1, "k": 1024, "M": 1024**2}
    lists = [int(number) * factors[unit] for number, unit in re.findall(r"IVF(\d+)([kM]?)", factory)]
    bits = [int(number or 8) for number in re.findall(r"PQ\d+(?:_\d+)?(?:x(\d+))?", factory)]
    return max([0, *lists, *(2 ** min(number, 64) for number in bits)])


@contextlib.contextmanager
def _in_words(plan: IndexPlan) -> Iterator[None]:
    """FAISS's errors become UsageError: what it cannot do with an index says something of the index."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise UsageError(f"FAISS cannot use the index '{plan.index}' here and says: {faiss_words(error)}. "
                         "Choose another, or Flat, which is exact") from error


@contextlib.contextmanager
def _torch_threads(faiss: Any) -> Iterator[None]:
    """As many threads as torch has: FAISS's own OpenMP does not know that limit."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextlib.contextmanager
def _matrix_products(faiss: Any) -> Iterator[None]:
    """However few the queries are: FAISS compares fewer than 128,000 numbers of them one by one, many times slower."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


@contextlib.contextmanager
def _openblas_core() -> Iterator[None]:
    """Tell the OpenBLAS inside FAISS's wheels which kernels this processor can run, while it is loaded.

    That OpenBLAS (0.3.15) takes processors newer than itself for a Prescott of 2004, and multiplies at a third of
    the speed that they have. Torch knows better.
    """
    name = "OPENBLAS_CORETYPE"
    known = None if "faiss" in sys.modules or name in os.environ else torch.backends.cpu.get_cpu_capability()
    core = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(known or "")
    if core is not None:
        os.environ[name] = core
    try:
        yield
    finally:
        if core is not None:
            os.environ.pop(name, None)
