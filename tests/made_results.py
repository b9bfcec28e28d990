"""Made-up records with galleries, and the images those name: what a page is made of in tests."""

import numpy as np
from PIL import Image

from patchssl.bench.report import made_up_records, with_gallery


def make_results(root, num_records=40, num_images=9):
    """Write records to ROOT/results and what their galleries show to ROOT/images; gives both."""
    for record in made_up_records(num_records):
        (with_gallery(record, num_images) if "aps" in record.detail else record).write(root / "results")
    (root / "images").mkdir()
    for i in range(num_images):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i:05d}.jpg")
    return root / "results", root / "images"
