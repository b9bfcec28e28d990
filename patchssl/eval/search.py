"""Nearest neighbors by inner product: exact by default, by an approximate index of FAISS where one is asked for.

Exact search has three backends that give the same neighbors: FAISS on GPUs, FAISS on the CPU, and torch in blocks
where FAISS is absent. Among neighbors of equal similarity the lower id comes first; which of several equal ones
are kept when the last place is tied is left to the backend. An approximate index is never used without its recall
against exact search being measured.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchssl.eval.backends import Opener, attempts_for, faiss_for
from patchssl.eval.database import Database, Features, as_features
from patchssl.eval.faiss import IndexPlan, import_faiss, make_index, num_gpus, require_plan
from patchssl.runtime.errors import DataError, UsageError
from patchssl.runtime.progress import Progress

RECALL_QUERIES = 1000
_LOW_RECALL = 0.9
_PRODUCTS_PER_BATCH = 2**36  # a second or two on one core
_LEAST_QUERIES = 4096  # in a batch: the database is read, and divided by its norms, once for each
_SAME = 1e-6  # similarities that differ by this share, as two ways of summing do, count as equal

log = logging.getLogger(__name__)


class Recall(NamedTuple):
    """How much of exact search an approximate index found, on a sample of the queries."""

    shares: dict[int, float]  # k -> mean share of the k nearest that are among the first k found
    num_queries: int  # in the sample
    seed: int

    def __str__(self) -> str:
        found = ", ".join(f"{share:.1%} of the {k} nearest" for k, share in self.shares.items())
        return f"{found}, measured against exact search on {self.num_queries:,} queries"


class Neighbors(NamedTuple):
    """What a search found: both (Q, k) on the CPU, and by what; `recall` is None where it was exact."""

    similarities: Tensor  # float32, descending; -infinity where an approximate index found too few
    ids: Tensor  # int64; -1 there
    backend: str
    recall: Recall | None


def search_topk(database: Features, queries: Features, k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The `k` largest inner products of every query with the database; cosines if both are L2-normalized.

    `database` (N, D), `queries` (Q, D) -> similarities (Q, min(k, N)) float32, descending, and ids of the
    same shape, int64, both on the CPU. `options` as in `find_neighbors`, which tells more; the log says the recall
    of an approximate index.
    """
    return find_neighbors(database, queries, k, **options)[:2]


def find_neighbors(database: Features, queries: Features, k: int, *, device: str | torch.device = "cpu",
                   cosine: bool = False, backend: str = "auto", index: str = "Flat", search_params: str = "",
                   gpus: str = "one", seed: int = 0, recall_at: Sequence[int] = (),
                   progress: Progress | None = None) -> Neighbors:
    """The `k` largest inner products of `queries` (Q, D) with `database` (N, D), in batches of queries.

    With `cosine` both are L2-normalized first, the database a block at a time: exact search on the CPU needs about
    0.1 GiB beside it and the result.

    `auto` takes FAISS on the GPU that `device` names if its build can, else torch there; without a GPU FAISS on the
    CPU, else torch; where one fails, the log says so and the next is used. `gpus` makes FAISS `shard` the database
    over all GPUs, or `replicate` it on each.

    `index` is a FAISS factory string (`IVF1024,PQ48`, `HNSW32`) and `search_params` its settings (`nprobe=16`,
    `efSearch=64`). Similarities are then the index's own, and some neighbors are missed: the recall at every k of
    `recall_at` (default: `k`) is measured on up to 1,000 queries. `seed` draws those and the vectors that the index
    is trained on; HNSW built by several threads is not the same twice. Such an index needs FAISS, on a GPU if it
    has a form for one.

    `progress` counts queries, before them the vectors that an approximate index takes in, after them the queries
    its recall is measured on. DataError for features that are empty, not finite or of two widths; UsageError for a
    backend that is not there, and for an index that is unknown or does not suit the database.
    """
    vectors, queries = as_features(database, "database"), as_features(queries, "queries")
    _require_request(vectors, queries, k, recall_at)
    searched, queries = Database(vectors, cosine), Database(queries, cosine).rows(slice(None))
    plan = IndexPlan(index, search_params, gpus, seed)
    require_plan(plan, len(vectors))
    k = min(k, len(vectors))
    sample = 0 if plan.exact else min(len(queries), RECALL_QUERIES)
    meter = _Meter(progress, len(queries) + (0 if plan.exact else len(vectors) + sample))
    attempts = attempts_for(torch.device(device), backend, k, plan, (len(vectors), vectors.shape[1]))
    name, similarities, ids = _first_that_works(attempts, searched, queries, k, meter)
    if plan.exact:
        return Neighbors(similarities, ids, name, None)
    wanted = sorted({min(at, k) for at in recall_at or (k,)})
    recall = measure_recall(vectors, queries, ids, ks=wanted, cosine=cosine, seed=seed, device=device,
                            progress=meter.part(sample))
    _report(plan, ids, recall)
    return Neighbors(similarities, ids, name, recall)


def _require_request(database: Tensor, queries: Tensor, k: int, recall_at: Sequence[int]) -> None:
    """DataError for features of two widths, UsageError for numbers of neighbors that there cannot be."""
    if database.shape[1] != queries.shape[1]:
        raise DataError(f"the queries have {queries.shape[1]} dimensions, the database has {database.shape[1]}; "
                        "features of both must come from one network")
    if k < 1:
        raise UsageError(f"{k} neighbors were asked for; at least 1 is needed")
    if min(recall_at, default=k) < 1 or max(recall_at, default=k) > k:
        raise UsageError(f"recall at {list(recall_at)} cannot be measured on {k} neighbors; 1 to {k} are there")


def measure_recall(
    database: Features,
    queries: Features,
    ids: Tensor,
    *,
    ks: Sequence[int],
    cosine: bool = False,
    num_queries: int = RECALL_QUERIES,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Recall:
    """The share of the k nearest that are among the first k of `ids` (Q, K), for every k of `ks`, K at most.

    The mean over `num_queries` of the queries, or all if there are fewer, which `seed` draws. A vector as similar
    as the k-th nearest counts as one of the k nearest, so that copies in the database cost nothing; -1 stands for
    nothing found.
    """
    searched = Database(as_features(database, "database").cpu(), cosine)
    queries = Database(as_features(queries, "queries").cpu(), cosine).rows(slice(None))
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed))
    sample = order[:num_queries].sort().values
    exact = find_neighbors(searched.vectors, queries[sample], max(ks), cosine=cosine, device=device, progress=progress)
    totals = dict.fromkeys(sorted(ks), 0.0)
    for query, found, best, right in zip(queries[sample], ids[sample], exact.similarities, exact.ids, strict=True):
        own = torch.where(found < 0, -torch.inf, searched.rows(found.clamp(min=0)) @ query)
        for k in totals:
            last = best[k - 1]
            hits = torch.isin(found[:k], right[:k]) | (own[:k] >= last - _SAME * last.abs())
            totals[k] += float(hits.double().mean())
    return Recall({k: total / len(sample) for k, total in totals.items()}, len(sample), seed)


def require_index(plan: IndexPlan, num_vectors: int, dimensions: int) -> None:
    """UsageError where `find_neighbors` would refuse `plan` for so many vectors: before features are computed."""
    require_plan(plan, num_vectors)
    if not plan.exact:
        make_index(faiss_for(plan), plan, dimensions, num_vectors)


def describe_backend(device: str | torch.device = "cpu") -> str:
    """In words: what `auto` searches with on `device`, and why not with something faster."""
    faiss, reason = import_faiss()
    if faiss is None:
        return f"torch on {device}, because FAISS cannot be imported ({reason}); exact search only"
    name = attempts_for(torch.device(device), "auto", 1, IndexPlan(), (1, 1))[0][0]
    build = "GPU build" if hasattr(faiss, "StandardGpuResources") else "CPU build"
    return f"{name} (FAISS {faiss.__version__}, {build} that sees {num_gpus(faiss)} GPUs)"


def faiss_version() -> str | None:
    """Version of FAISS, None where it is absent."""
    faiss, _ = import_faiss()
    return None if faiss is None else str(faiss.__version__)


class _Meter:
    """Counts to `total` and tells `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)

    def part(self, count: int) -> Progress:
        """A progress that ends `count` further on."""
        start = self.done

        def shown(done: int, total: int) -> None:
            self.done = start
            self.add(count * done // total)

        return shown


def _first_that_works(
    attempts: list[tuple[str, Opener]], database: Database, queries: Tensor, k: int, meter: _Meter
) -> tuple[str, Tensor, Tensor]:
    """The first attempt that does not fail, its similarities and its ids; the log says which failed and why."""
    for place, (name, opener) in enumerate(attempts):
        meter.done = 0
        try:
            search, found = opener(database, k, meter.add), []
            for batch in _batches(queries, database.vectors.numel()):
                found.append(_lower_id_first(*search(batch, meter.add)))
            return name, torch.cat([part for part, _ in found]), torch.cat([part for _, part in found])
        except RuntimeError as error:
            if place + 1 == len(attempts):
                raise
            reason = str(error).strip().partition("\n")[0]
            log.warning("search by %s failed (%s); going on with %s", name, reason, attempts[place + 1][0])
    raise AssertionError("a search has at least one attempt")


def _batches(queries: Tensor, num_values: int) -> Sequence[Tensor]:
    """`queries` in equal parts that take a second or two each against a database of `num_values` numbers."""
    rows = max(_LEAST_QUERIES, _PRODUCTS_PER_BATCH // num_values)
    return queries.tensor_split(-(-len(queries) // rows))


def _report(plan: IndexPlan, ids: Tensor, recall: Recall) -> None:
    """The log says what was found, and what would find more."""
    settings = f" with {plan.search_params}" if plan.search_params else ""
    missing = int((ids < 0).any(dim=1).sum())
    if missing:
        log.warning("the index %s%s found fewer than %d neighbors for %d of %d queries; a higher nprobe or efSearch "
                    "finds more", plan.index, settings, ids.shape[1], missing, len(ids))
    low = min(recall.shares.values()) < _LOW_RECALL
    advice = "; more is found by a higher nprobe (IVF) or efSearch (HNSW), a longer code (PQ), ',RFlat' at the end"
    log.log(logging.WARNING if low else logging.INFO, "the index %s%s found %s%s", plan.index, settings, recall,
            advice if low else "")


def _lower_id_first(similarities: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by descending similarity, then by ascending id; only rows that hold a tie are touched."""
    tied = (similarities[:, 1:] == similarities[:, :-1]).any(dim=1)
    if tied.any():
        by_id, order = ids[tied].sort(dim=1)
        values, again = similarities[tied].gather(1, order).sort(dim=1, descending=True, stable=True)
        similarities[tied], ids[tied] = values, by_id.gather(1, again)
    return similarities, ids
