"""Speed of the benchmarks beside a floor or the plain way, in one run; JSON-able out.

Search, scoring and probes run on one thread and count processor seconds; the whole suite runs as users run it, by the
clock.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from patchssl.bench.probes import time_probes
from patchssl.bench.timing import Candidate, machine, median_times, one_thread, tensor_memory
from patchssl.eval.cache import FeatureCache
from patchssl.eval.knn import knn_scores
from patchssl.eval.metrics import average_precision, precision_at
from patchssl.eval.revisited import score_similarity
from patchssl.eval.search import describe_backend, search_topk
from patchssl.eval.suite import plan_suite, run_suite
from patchssl.eval.tasks import ComputeOptions, default_tasks
from patchssl.models.load import load_backbone
from patchssl.runtime.console import Console

DIMENSIONS, NEIGHBORS, CLASSES = 384, 20, 100
LABELED = {"easy": 40, "hard": 60, "junk": 50}  # images a query, about what Oxford and Paris have
KS = (1, 5, 10)


def bench_search(database: int = 50_000, queries: int = 10_000, repeats: int = 3) -> dict[str, Any]:
    """k-NN of `queries` against `database` features in 384 dimensions, beside the bare matrix product.

    "product" multiplies in blocks and keeps nothing, "search" finds the 20 nearest, "scoring" is all of `eval knn`
    after the features: search, votes for four k, accuracy.
    """
    rng = torch.Generator().manual_seed(0)
    base, asked = (F.normalize(torch.randn(count, DIMENSIONS, generator=rng)) for count in (database, queries))
    labels = [np.arange(count) % CLASSES for count in (database, queries)]

    def product(_turn: int) -> None:
        for block in asked.split(512):
            block @ base.T

    times = median_times({
        "product": Candidate(product),
        "search": Candidate(lambda _: search_topk(base, asked, NEIGHBORS)),
        "scoring": Candidate(lambda _: knn_scores(base, labels[0], asked, labels[1], headline_k=20)),
    }, repeats)
    ratios = {name: times[name] / times["product"] for name in ("search", "scoring")}
    return {"what": f"{queries:,} queries against {database:,} features of {DIMENSIONS} dimensions, one thread",
            "seconds": times, "times the product": ratios, "searched with": describe_backend()}


def bench_large_search(database: int = 320_000, queries: int = 1024, k: int = 200, repeats: int = 3) -> dict[str, Any]:
    """k-NN of few queries against many features in 384 dimensions, beside products of blocks with torch's topk.

    At ImageNet's 1.28 million the ratio is much the same. Memory is of the tensors made, beyond the features.
    """
    rng = torch.Generator().manual_seed(0)
    base, asked = (torch.randn(count, DIMENSIONS, generator=rng) for count in (database, queries))
    labels = [np.arange(count) % CLASSES for count in (database, queries)]

    def plain(_turn: int) -> None:
        wanted, best = F.normalize(asked), torch.empty(queries, 0)
        for block in base.split(65_536):
            divided = F.normalize(block)
            found = torch.cat([(some @ divided.T).topk(k).values for some in wanted.split(128)])
            best = torch.cat([best, found], dim=1).topk(k).values

    def scored(_turn: int) -> None:
        knn_scores(base, labels[0], asked, labels[1], ks=(k,))

    times = median_times({"plain": Candidate(plain), "scoring": Candidate(scored)}, repeats)
    return {"what": f"{queries:,} queries, {k} neighbors, {database:,} features of {DIMENSIONS} dimensions, one thread",
            "seconds": times, "times the plain way": times["scoring"] / times["plain"],
            "MiB beside the features": tensor_memory(lambda: scored(0)), "features' MiB": base.nbytes / 2**20}


def bench_ranking(database: int = 1_000_000, queries: int = 70, repeats: int = 3) -> dict[str, Any]:
    """Scoring of three revisited levels from similarities, beside sorting everything and scoring in plain Python."""
    rng = np.random.default_rng(0)
    similarity = rng.standard_normal((queries, database), dtype=np.float32)
    gnd = [dict(zip(LABELED, np.split(rng.choice(5_000, sum(LABELED.values()), replace=False),
                                      np.cumsum(list(LABELED.values()))[:-1]), strict=True)) for _ in range(queries)]
    for row, truth in zip(similarity, gnd, strict=True):
        row[truth["easy"]] += 3
        row[truth["hard"]] += 1.5
    plain = _plain_scores(similarity, gnd)
    ours = score_similarity(similarity, gnd)
    apart = max(abs(plain[level][name] - ours[level][name]) for level in plain for name in plain[level])
    times = median_times({"by counting": Candidate(lambda _: score_similarity(similarity, gnd)),
                          "plain": Candidate(lambda _: _plain_scores(similarity, gnd))}, repeats)
    return {"what": f"{queries} queries against {database:,} images, three levels, one thread",
            "seconds": times, "times faster": times["plain"] / times["by counting"], "largest difference": apart}


def _plain_scores(similarity: np.ndarray, gnd: Sequence[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """The same by an argsort of every query and a pass over each ranking per level."""
    levels = {"easy": (["easy"], ["hard", "junk"]), "medium": (["easy", "hard"], ["junk"]),
              "hard": (["hard"], ["easy", "junk"])}
    order = np.argsort(-similarity, axis=1, kind="stable")
    scores = {}
    for level, (positive, junk) in levels.items():
        rows = []
        for ranking, truth in zip(order, gnd, strict=True):
            kept = ranking[~np.isin(ranking, np.concatenate([truth[name] for name in junk]))]
            ranks = np.flatnonzero(np.isin(kept, np.concatenate([truth[name] for name in positive])))
            precisions = precision_at(ranks, KS)
            rows.append([average_precision(ranks, len(ranks)), *(precisions[k] for k in KS)])
        means = np.mean(rows, axis=0)
        scores[level] = dict(zip(("map", *(f"mp@{k}" for k in KS)), map(float, means), strict=True))
    return scores


def bench_probes(epochs: int = 10, *, console: Console | None = None, **options: Any) -> dict[str, Any]:
    """A grid of probes on cached features beside `epochs` of one as DINO trains it; `options` as in `time_probes`."""
    def show(what: str, done: int, total: int) -> None:
        if console is not None:
            console.update(done, total, what=what)

    with one_thread():
        return time_probes(epochs=epochs, progress=show, **options)


def bench_suite(model: str, data: str, *, console: Console | None = None) -> dict[str, Any]:
    """`eval all --overwrite` of `model` on `data` twice, with a cache that is empty at first."""
    backbone = load_backbone(model)
    with tempfile.TemporaryDirectory() as folder:
        options = ComputeOptions(torch.device("cpu"), workers=2, cache=FeatureCache(Path(folder)), progress=console)
        plan = plan_suite(backbone, data, default_tasks(), None, options)
        seconds = {}
        for name in ("first run", "second run"):
            began = time.perf_counter()
            _, failed = run_suite(backbone, plan, options)
            seconds[name] = time.perf_counter() - began
    return {"what": f"eval all --overwrite of {model} on {data}, twice", "cells": [cell.label() for cell in plan.run],
            "images": plan.images, "seconds": seconds, "failed": failed,
            "times faster": seconds["first run"] / seconds["second run"]}


def bench_eval(model: str | None = None, data: str | None = None, *, console: Console | None = None) -> dict[str, Any]:
    """Search, scoring, probes and, where `model` and `data` are named, the suite; "aims" are those of the design."""
    found: dict[str, Any] = {"k-NN": bench_search(), "k-NN, large": bench_large_search(), "revisited": bench_ranking(),
                             "linear probes": bench_probes(console=console)}
    if model is not None and data is not None:
        found["suite"] = bench_suite(model, data, console=console)
    return {**found, "aims": {"k-NN: times the product, at most": 1.2,
                              "k-NN, large: times the plain way, at most": 1.2, "revisited: times faster, at least": 5,
                              "linear probes: times faster with their features, at least": 1,
                              "suite: times faster, at least": 20}, "machine": machine()}
