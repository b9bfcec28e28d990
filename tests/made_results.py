"""Made-up records with galleries, and the images those name: what tables and a page are made of in tests."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

report_bench = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "report.py")))
made_up_records, with_gallery = report_bench.made_up_records, report_bench.with_gallery


def make_results(root, num_records=40, num_images=9):
    """Write records to ROOT/results and what their galleries show to ROOT/images; gives both."""
    for record in made_up_records(num_records):
        (with_gallery(record, num_images) if "aps" in record.detail else record).write(root / "results")
    (root / "images").mkdir()
    for i in range(num_images):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i:05d}.jpg")
    return root / "results", root / "images"
