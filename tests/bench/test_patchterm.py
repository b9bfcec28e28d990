"""The bench of the patch term: what it compares is the same, and what it says fits into JSON."""

import json

import pytest
import torch

from patchssl.bench.patchterm import PER_IMAGE, apart, bench_patch_term, make_patch_term, term_memory
from patchssl.runtime.errors import PatchSSLError


def test_matches_stay_within_images_and_every_student_token_has_one():
    term = make_patch_term(num_prototypes=8, num_images=3, device=torch.device("cpu"))
    students, teachers, matches = PER_IMAGE.values()
    assert torch.equal(term.student_rows // students, term.teacher_rows // teachers)
    assert len(term.weight) == 3 * matches
    assert len(term.student_rows.unique()) == len(term.bottleneck) == 3 * students


@pytest.mark.slow
def test_a_measurement_that_fails_in_its_process_says_why():
    with pytest.raises(PatchSSLError, match=r"term_memory of .*failed.*no_such_device"):
        apart(term_memory, "ours", 8, 1, "no_such_device")


@pytest.mark.slow
def test_a_small_bench():
    found = json.loads(json.dumps(bench_patch_term(num_prototypes=3000, num_images=4, repeats=1)))
    assert found["tokens"]["student tokens"] == 4 * PER_IMAGE["student tokens"]
    assert max(found["relative difference"].values()) < 1e-5
    assert found["of plain autograd"]["time"] == pytest.approx(found["seconds"]["ours"] / found["seconds"]["plain"])
    assert 0 < found["MiB"]["ours"] < found["MiB"]["plain"]
