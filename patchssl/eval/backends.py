"""What searches: FAISS on GPUs, FAISS on the CPU, or torch, in the order in which they are to be tried."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchssl.eval.database import Database, Told, nearest_by_blocks
from patchssl.eval.faiss import (
    MAX_K_GPU,
    IndexPlan,
    Searcher,
    gpu_obstacle,
    import_faiss,
    make_index,
    num_gpus,
    open_exact,
    open_on_cpu,
    open_on_gpus,
)
from patchssl.runtime.errors import UsageError, unknown_choice

BACKENDS = ("auto", "faiss-gpu", "faiss-cpu", "torch")
_SIMILARITIES = 2**23  # 32 MiB at a time
_ON_GPU = 16  # times as many
_CPU = torch.device("cpu")

log = logging.getLogger(__name__)

Opener = Callable[[Database, int, Told], Searcher]  # the database, k, and whom to tell of vectors taken in
Attempt = tuple[str, Opener]


def attempts_for(
    device: torch.device, backend: str, k: int, plan: IndexPlan, shape: tuple[int, int]
) -> list[Attempt]:
    """What to search a database of this shape with, best first; a backend asked for by name has no substitute.

    UsageError for a backend that is not there, or a plan that does not suit the database.
    """
    if backend not in BACKENDS:
        raise UsageError(unknown_choice("search backend", backend, BACKENDS))
    if plan.exact:
        attempts = _exact_attempts(device, backend, k, plan)
    else:
        attempts = _approximate_attempts(device, backend, k, plan, shape)
    if plan.gpus != "one" and not attempts[0][0].startswith("faiss-gpu"):
        log.warning("'%s' over several GPUs is left out: the search is by %s", plan.gpus, attempts[0][0])
    return attempts


def faiss_for(plan: IndexPlan) -> Any:
    """FAISS for an approximate index; UsageError where it is absent."""
    faiss, reason = import_faiss()
    if faiss is None:
        raise UsageError(f"the index '{plan.index}' needs FAISS, which cannot be imported ({reason}); "
                         "the index 'Flat' is exact and can be searched by torch")
    return faiss


def _exact_attempts(device: torch.device, backend: str, k: int, plan: IndexPlan) -> list[Attempt]:
    faiss, reason = import_faiss()
    by_torch: Attempt = (f"torch on {device}", partial(_open_torch, device))
    if backend == "torch":
        return [by_torch]
    if faiss is None:
        if backend != "auto":
            raise UsageError(f"search backend '{backend}' needs FAISS, which cannot be imported ({reason})")
        return [by_torch, *([("torch on cpu", partial(_open_torch, _CPU))] if device.type != "cpu" else [])]
    gpu_can = bool(num_gpus(faiss)) and k <= MAX_K_GPU
    if backend == "faiss-gpu" and not gpu_can:
        raise UsageError(
            f"search backend 'faiss-gpu' cannot find {k} neighbors: FAISS {faiss.__version__} sees "
            f"{num_gpus(faiss)} GPUs, and finds {MAX_K_GPU} at most; 'auto' takes what is there"
        )
    on_cpu: Attempt = ("faiss-cpu", partial(open_exact, faiss))
    if backend != "auto":
        return [_on_gpus(faiss, device, plan) if backend == "faiss-gpu" else on_cpu]
    faiss_first = [_on_gpus(faiss, device, plan)] if gpu_can and device.type == "cuda" else []
    return [*faiss_first, *([by_torch] if device.type != "cpu" else []), on_cpu]


def _approximate_attempts(
    device: torch.device, backend: str, k: int, plan: IndexPlan, shape: tuple[int, int]
) -> list[Attempt]:
    if backend == "torch":
        raise UsageError(f"search by torch is exact: the index '{plan.index}' needs FAISS, 'Flat' does not")
    faiss = faiss_for(plan)
    index = make_index(faiss, plan, shape[1], shape[0])
    on_cpu: Attempt = ("faiss-cpu", partial(open_on_cpu, faiss, plan))
    if backend == "faiss-cpu" or (backend == "auto" and device.type == "cpu"):
        return [on_cpu]
    if obstacle := gpu_obstacle(faiss, index, k):
        if backend == "faiss-gpu":
            raise UsageError(f"the index '{plan.index}' cannot be searched on a GPU: {obstacle}; 'auto' searches "
                             "it on the CPU")
        log.warning("the index %s is searched on the CPU: %s", plan.index, obstacle)
        return [on_cpu]
    on_gpus = _on_gpus(faiss, device, plan)
    return [on_gpus] if backend == "faiss-gpu" else [on_gpus, on_cpu]


def _on_gpus(faiss: Any, device: torch.device, plan: IndexPlan) -> Attempt:
    count = num_gpus(faiss)
    name = "faiss-gpu" if plan.gpus == "one" or count == 1 else f"faiss-gpu ({plan.gpus}, {count} GPUs)"
    return name, partial(open_on_gpus, faiss, device.index or 0, plan)


def _open_torch(device: torch.device, database: Database, k: int, added: Told) -> Searcher:
    placed = database.to(device)

    def search(queries: Tensor, told: Told) -> tuple[Tensor, Tensor]:
        return nearest_by_blocks(placed, queries.to(device), k, partial(_nearest, k), told)

    return search


def _nearest(k: int, queries: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities and rows of `block` (Q, k) on the CPU, fewer where it holds fewer."""
    rows = max(1, _SIMILARITIES * (1 if block.device.type == "cpu" else _ON_GPU) // len(block))
    found = [(some @ block.T).topk(min(k, len(block)), dim=1) for some in queries.split(rows)]
    return torch.cat([values.cpu() for values, _ in found]), torch.cat([places.cpu() for _, places in found])
