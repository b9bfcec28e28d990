"""Which seeds are taken: those that NumPy and torch take, and no others."""

import numpy as np
import pytest
import torch
from cases import each

from patchssl.runtime.errors import UsageError
from patchssl.runtime.seeds import MOST_SEED, require_seed


@each("seed", [0, 7, np.int64(7), MOST_SEED])
def test_what_every_generator_takes_is_taken(seed):
    number = require_seed(seed)
    assert (number, type(number)) == (seed, int)
    torch.Generator().manual_seed(number + 1)  # what a head is drawn by
    np.random.SeedSequence([number, 0, 0])


def test_one_more_is_too_many_for_torch():
    with pytest.raises((RuntimeError, ValueError), match="Overflow"):
        torch.Generator().manual_seed(MOST_SEED + 2)


@each(("seed", "words"), [
    (-1, "seed = -1 is negative"), (MOST_SEED + 1, "beyond 64 bits"), (10**30, "beyond 64 bits"),
    (1.5, "seed = 1.5 is no whole number"), (1.0, "no whole number"), ("1", "seed = '1' is no whole number"),
    (None, "no whole number"),
])
def test_others_are_refused(seed, words):
    with pytest.raises(UsageError) as caught:
        require_seed(seed)
    assert words in str(caught.value)
