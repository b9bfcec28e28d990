"""Seconds from many result records to the tables; JSON-able out."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from patchssl.bench import machine
from patchssl.eval.results import Result, pack_bits
from patchssl.tabling import make_tables

CLASSIFIED = [(task, f"set-{i}", metric) for i in range(8) for task, metric in (("knn", "top1@20"), ("linear", "top1"))]
RANKED = [("copydays", "strong", 229), ("roxford5k", "medium", 70), ("rparis6k", "medium", 70),
          ("revisited", "hard", 70)]  # task, level, queries
PER_NETWORK = len(CLASSIFIED) + len(RANKED)
NUM_TEST = 1_000  # test images of a classification
SEEDS = 4  # networks of a row


def bench_tables(num_records: int = 10_000) -> dict[str, Any]:
    """Seconds from `num_records` files to all tables, by the clock: reading, tests for what is bold, writing.

    Networks of 20 records each, four seeds a row in one half, single networks in the other; one thread.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for record in made_up_records(num_records):
            record.write(root / "results")
        start = time.perf_counter()
        _, paths, problems = make_tables(root / "results", root / "out", paper=True)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in paths)
    return {"what": f"tables from {num_records:,} records", "seconds": seconds,
            "files": len(paths), "bytes": size,
            "left out": len(problems), "machine": machine()}


def made_up_records(num_records: int, seed: int = 0) -> Iterator[Result]:
    """`num_records` records of made-up networks, of known quality each, with detail per image or query."""
    rng = np.random.default_rng(seed)
    for i in range(num_records):
        number, cell = divmod(i, PER_NETWORK)
        row, turn = divmod(number // 2, SEEDS) if number % 2 else (number // 2, 0)
        quality = 0.4 + 0.4 * ((37 * row) % 101) / 101
        base: dict[str, Any] = {
            "model": f"network-{number}", "method": "other" if number % 2 == 0 else ("pwself", "dino", "ibot")[row % 3],
            "arch": f"vit-{row}", "weights_sha256": f"{number:064x}", "pretrain_data": "made up", "seed": turn,
            "pretrain_epochs": 100.0, "dataset_fingerprint": "d" * 64, "protocol": "dino", "protocol_version": 1,
            "protocol_settings": {"resize": 256}, "protocol_fingerprint": "1" * 16, "versions": {}, "device": "cpu",
            "duration": 1.0}
        yield Result(**base, **_numbers(cell, quality, rng))


def _numbers(cell: int, quality: float, rng: np.random.Generator) -> dict[str, Any]:
    """Task, data set, metrics and detail of one record."""
    if cell < len(CLASSIFIED):
        task, dataset, metric = CLASSIFIED[cell]
        correct = rng.random(NUM_TEST) < quality
        return {"task": task, "dataset": dataset, "metrics": {metric: float(correct.mean())},
                "detail": {"num_test": NUM_TEST, "correct": {metric: pack_bits(correct)}}}
    task, level, num = RANKED[cell - len(CLASSIFIED)]
    aps = np.round(rng.beta(4 * quality, 4 * (1 - quality), num), 6)
    return {"task": task, "dataset": task, "metrics": {f"{level}/map": float(aps.mean())},
            "detail": {"aps": {level: aps.tolist()}}}
