"""Seconds from many made-up result records to the tables and to the page, for developers; JSON on stdout.

    python benchmarks/report.py tables --records 10000
    python benchmarks/report.py page --records 200 --images 100
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchssl.bench.timing import machine
from patchssl.eval.galleries import ROLES
from patchssl.eval.records import Result, pack_bits
from patchssl.report.page.make import make_report
from patchssl.report.tables.make import make_tables

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


def bench_page(num_records: int = 200, num_images: int = 100) -> dict[str, Any]:
    """Seconds and bytes of the page of `num_records` files whose galleries show `num_images` images of 640 x 480.

    The images are noise, which makes the largest pictures; every ranked record shows 16 queries with 10 results and
    4 late positives each.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for record in made_up_records(num_records):
            (with_gallery(record, num_images) if "aps" in record.detail else record).write(root / "results")
        (root / "images").mkdir()
        rng = np.random.default_rng(0)
        for i in range(num_images):
            pixels = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{i:05d}.jpg", quality=90)
        start = time.perf_counter()
        made = make_report(root / "out", results=root / "results", data=[root / "images"])
        seconds = time.perf_counter() - start
        return {"what": f"page of {num_records:,} records and {num_images:,} images", "seconds": seconds,
                "bytes": made.path.stat().st_size, "pictures": made.num_pictures, "left out": len(made.problems),
                "machine": machine()}


def with_gallery(record: Result, num_images: int, seed: int = 0) -> Result:
    """`record` with galleries of images named 00000.jpg and so on, in roles drawn at random."""
    rng = np.random.default_rng([seed, int(record.weights_sha256, 16) % 2**32])

    def image() -> dict[str, Any]:
        return {"name": f"{rng.integers(num_images):05d}.jpg"}

    galleries = {level: [
        {"query": image(), "ap": round(0.1 * (i % 8), 1), "end": "worst" if i < 8 else "best", "num_positives": 20,
         "results": [{**image(), "role": ROLES[rng.integers(len(ROLES))]} for _ in range(10)],
         "late": [{**image(), "rank": 20 + rank} for rank in range(4)]}
        for i in range(16)] for level in record.detail["aps"]}
    return replace(record, detail={**record.detail, "galleries": galleries})


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
    """Task, dataset, metrics and detail of one record."""
    if cell < len(CLASSIFIED):
        task, dataset, metric = CLASSIFIED[cell]
        correct = rng.random(NUM_TEST) < quality
        return {"task": task, "dataset": dataset, "metrics": {metric: float(correct.mean())},
                "detail": {"num_test": NUM_TEST, "correct": {metric: pack_bits(correct)}}}
    task, level, num = RANKED[cell - len(CLASSIFIED)]
    aps = np.round(rng.beta(4 * quality, 4 * (1 - quality), num), 6)
    return {"task": task, "dataset": task, "metrics": {f"{level}/map": float(aps.mean())},
            "detail": {"aps": {level: aps.tolist()}}}


def main() -> None:
    """Measure what the command line asks for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tables", "page"])
    parser.add_argument("--records", type=int, help="default: 10,000 for the tables, 200 for the page")
    parser.add_argument("--images", type=int, default=100, help="in the galleries of the page; default: %(default)s")
    asked = parser.parse_args()
    found = (bench_tables(asked.records or 10_000) if asked.what == "tables"
             else bench_page(asked.records or 200, asked.images))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
