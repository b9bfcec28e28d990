"""Exact nearest neighbors by inner product, and the only file that names FAISS.

Three backends give the same neighbors: FAISS on a GPU, FAISS on the CPU, and torch in blocks where FAISS is
absent. Among neighbors of equal similarity the lower id comes first; which of several equal ones are kept
when the last place is tied is left to the backend.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchssl.errors import DataError, UsageError, one_of

BACKENDS = ("auto", "faiss-gpu", "faiss-cpu", "torch")
MAX_K_FAISS_GPU = 2048
_GPU_TEMPORARY_BYTES = 256 * 2**20
_QUERIES_PER_BLOCK, _DATABASE_PER_BLOCK = 128, 65536  # 32 MiB of similarities at a time
_CPU = torch.device("cpu")
_ON_GPU = 16  # times as many queries in a block

log = logging.getLogger(__name__)


def search_topk(
    database: Tensor | np.ndarray,
    queries: Tensor | np.ndarray,
    k: int,
    *,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The `k` largest inner products of every query with the database; cosines if both are L2-normalized.

    `database` (N, D), `queries` (Q, D) -> similarities (Q, min(k, N)) float32, descending, and ids of the
    same shape, int64, both on the CPU. `auto` takes FAISS on the GPU that `device` names if its build can,
    else torch there; without a GPU FAISS on the CPU, else torch; where one fails, the log says so and the
    next is used. DataError for features that are empty, not finite or of two widths, UsageError for a
    backend that is not there.
    """
    database, queries = as_features(database, "database"), as_features(queries, "queries")
    if database.shape[1] != queries.shape[1]:
        raise DataError(
            f"the queries have {queries.shape[1]} dimensions, the database has {database.shape[1]}; "
            "features of both must come from one network"
        )
    if k < 1:
        raise UsageError(f"{k} neighbors were asked for; at least 1 is needed")
    k = min(k, len(database))
    attempts = _attempts(torch.device(device), backend, k)
    for place, (name, run) in enumerate(attempts):
        try:
            return _lower_id_first(*run(database, queries, k))
        except RuntimeError as error:
            if place + 1 == len(attempts):
                raise
            reason = str(error).strip().partition("\n")[0]
            log.warning("search by %s failed (%s); going on with %s", name, reason, attempts[place + 1][0])
    raise AssertionError("a search has at least one attempt")


def as_features(features: Tensor | np.ndarray, what: str) -> Tensor:
    """`features` as (N, D) float32, contiguous; DataError, naming them `what`, where empty or not finite."""
    tensor = torch.as_tensor(features).detach().to(torch.float32).contiguous()
    if tensor.ndim != 2 or not tensor.numel():
        shape = tuple(tensor.shape)
        raise DataError(f"the {what} features have the shape {shape}; (images, dimensions) is needed")
    if not torch.isfinite(tensor).all():
        bad = (~torch.isfinite(tensor).all(dim=1)).nonzero().flatten().tolist()
        raise DataError(f"{len(bad)} of the {len(tensor)} {what} features hold NaN or infinity, first in row {bad[0]}")
    return tensor


def describe_backend(device: str | torch.device = "cpu") -> str:
    """In words: what `auto` searches with on `device`, and why not with something faster."""
    faiss, reason = _import_faiss()
    if faiss is None:
        return f"torch on {device}, because FAISS cannot be imported ({reason})"
    name = _attempts(torch.device(device), "auto", 1)[0][0]
    build = "GPU build" if hasattr(faiss, "StandardGpuResources") else "CPU build"
    return f"{name} (FAISS {faiss.__version__}, {build} that sees {_num_gpus(faiss)} GPUs)"


def faiss_version() -> str | None:
    """Version of FAISS, None where it is absent."""
    faiss, _ = _import_faiss()
    return None if faiss is None else str(faiss.__version__)


_Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _attempts(device: torch.device, backend: str, k: int) -> list[tuple[str, _Search]]:
    """What to search with, best first; a backend that was asked for by name has no substitute."""
    if backend not in BACKENDS:
        raise UsageError(one_of("search backend", backend, BACKENDS))
    faiss, reason = _import_faiss()
    by_torch: tuple[str, _Search] = (f"torch on {device}", partial(_search_torch, device=device))
    if backend == "torch":
        return [by_torch]
    if faiss is None:
        if backend != "auto":
            raise UsageError(f"search backend '{backend}' needs FAISS, which cannot be imported ({reason})")
        return [by_torch, *([("torch on cpu", _search_torch)] if device.type != "cpu" else [])]
    on_cpu: tuple[str, _Search] = ("faiss-cpu", partial(_search_faiss_cpu, faiss))
    on_gpu: tuple[str, _Search] = ("faiss-gpu", partial(_search_faiss_gpu, faiss, device.index or 0))
    gpu_can = bool(_num_gpus(faiss)) and k <= MAX_K_FAISS_GPU
    if backend == "faiss-gpu" and not gpu_can:
        raise UsageError(
            f"search backend 'faiss-gpu' cannot find {k} neighbors: FAISS {faiss.__version__} sees "
            f"{_num_gpus(faiss)} GPUs, and finds {MAX_K_FAISS_GPU} at most; 'auto' takes what is there"
        )
    if backend != "auto":
        return [on_gpu if backend == "faiss-gpu" else on_cpu]
    faiss_first = [on_gpu] if gpu_can and device.type == "cuda" else []
    return [*faiss_first, *([by_torch] if device.type != "cpu" else []), on_cpu]


def _search_torch(database: Tensor, queries: Tensor, k: int, device: torch.device = _CPU) -> tuple[Tensor, Tensor]:
    """Blocks of queries against blocks of the database, so that memory does not grow with either."""
    rows = _QUERIES_PER_BLOCK * (1 if device.type == "cpu" else _ON_GPU)
    found = []
    database = database.to(device)
    for some in queries.split(rows):
        block = some.to(device)
        best, ids = block.new_empty(len(block), 0), block.new_empty(len(block), 0, dtype=torch.int64)
        for start in range(0, len(database), _DATABASE_PER_BLOCK):
            part = block @ database[start : start + _DATABASE_PER_BLOCK].T
            values, places = part.topk(min(k, part.shape[1]), dim=1)
            candidates = torch.cat([best, values], dim=1)
            best, chosen = candidates.topk(min(k, candidates.shape[1]), dim=1)
            ids = torch.cat([ids, places + start], dim=1).gather(1, chosen)
        found.append((best.cpu(), ids.cpu()))
    return torch.cat([best for best, _ in found]), torch.cat([ids for _, ids in found])


def _search_faiss_cpu(faiss: Any, database: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The search of IndexFlatIP without the index's copy of the database."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())  # its own OpenMP does not know torch's limit
    try:
        found = faiss.knn(queries.cpu().numpy(), database.cpu().numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    finally:
        faiss.omp_set_num_threads(before)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _search_faiss_gpu(faiss: Any, gpu: int, database: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_GPU_TEMPORARY_BYTES)
    index = faiss.index_cpu_to_gpu(resources, gpu, faiss.IndexFlatIP(database.shape[1]))
    index.add(database.cpu().numpy())
    similarities, ids = index.search(queries.cpu().numpy(), k)
    return torch.from_numpy(similarities), torch.from_numpy(ids)


def _lower_id_first(similarities: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by descending similarity, then by ascending id; only rows that hold a tie are touched."""
    tied = (similarities[:, 1:] == similarities[:, :-1]).any(dim=1)
    if tied.any():
        by_id, order = ids[tied].sort(dim=1)
        values, again = similarities[tied].gather(1, order).sort(dim=1, descending=True, stable=True)
        similarities[tied], ids[tied] = values, by_id.gather(1, again)
    return similarities, ids


def _num_gpus(faiss: Any) -> int:
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def _import_faiss() -> tuple[Any, str]:
    """FAISS and "", or None and the reason why it cannot be imported."""
    try:
        with _openblas_core():
            return importlib.import_module("faiss"), ""
    except ImportError as error:
        return None, str(error)


@contextlib.contextmanager
def _openblas_core() -> Iterator[None]:
    """Tell the OpenBLAS inside FAISS's wheels which kernels this processor can run, while it is loaded.

    That OpenBLAS (0.3.15) takes processors newer than itself for a Prescott of 2004, and multiplies at a
    third of the speed that they have.
    """
    name = "OPENBLAS_CORETYPE"
    core = None if "faiss" in sys.modules or name in os.environ else _core_of_processor()
    if core is not None:
        os.environ[name] = core
    try:
        yield
    finally:
        if core is not None:
            os.environ.pop(name, None)


def _core_of_processor() -> str | None:
    """OpenBLAS's name for the best kernels that are safe here; None where it must look itself."""
    if platform.machine() != "x86_64":
        return None
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    if {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "fma"} <= flags:
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= flags else None
