import json

import pytest
import torch

from patchssl.bench import matching


def test_center_is_exact_and_paper_is_not():
    center, paper = (matching.rule_quality(rule, num_pairs=500) for rule in ("center", "paper"))
    assert center["exact"] == 1 and center["off by more than a patch"] == 0
    assert 0.36 < paper["exact"] < 0.48  # 41.8 % over 6,000 pairs
    assert 0.08 < paper["off by more than a patch"] < 0.17  # 12.3 %
    assert min(center["matches"], paper["matches"]) > 20


def test_bench_matching_reports_every_rule_peer_and_patch_size():
    report = json.loads(json.dumps(matching.bench_matching(num_images=2, repeats=1, num_pairs=50)))
    assert set(report["milliseconds"]) == {"patch 32", "patch 16", "patch 8"}
    for row in report["milliseconds"].values():
        assert set(row) == {"center", "paper", "pair by pair", "similarity"}
        assert all(value > 0 for value in row.values())
    memory = report["MiB"]
    assert all(0 < row["center"] < row["similarity"] for row in memory.values())
    assert memory["patch 8"]["similarity"] > 30 * memory["patch 32"]["similarity"]  # patches grow 16 times
    row, ratios = report["milliseconds"]["patch 16"], report["times faster than"]
    assert ratios["similarity"]["patch 16"] == pytest.approx(row["similarity"] / row["center"])
    assert report["machine"]["threads"] == 1 and report["machine"]["versions"]["torch"] == torch.__version__


def test_similarity_takes_the_teacher_token_of_greatest_cosine():
    teacher, local = matching._random_tokens(2, 32)
    globals_, locals_ = matching._similarity(teacher, local)
    assert globals_.shape == (2, 2, 49) and locals_.shape == (2, 2, 72)
    # student view 3, patch 5 of image 1 against teacher view 0
    cosines = torch.stack([(teacher[1, 0, n] * local[1, 3, 5]).sum() for n in range(49)])
    assert locals_[1, 0, 3 * 9 + 5] == cosines.argmax()
    cosines = torch.stack([(teacher[0, 1, n] * teacher[0, 0, 7]).sum() for n in range(49)])
    assert globals_[0, 1, 7] == cosines.argmax()
