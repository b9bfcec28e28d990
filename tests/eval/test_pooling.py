import numpy as np
import pytest
import torch
from cases import each

from patchssl.eval.pooling import compute_outputs, gem, mean_patch
from patchssl.models.pixels import RawPixels
from patchssl.runtime.errors import UsageError


def tokens(batch=3, count=7, dims=5):
    return torch.randn(batch, count, dims, generator=torch.Generator().manual_seed(0))


def slow_gem(patches, p):
    """One number at a time, with Python's floats."""
    images = []
    for image in patches.tolist():
        columns = zip(*image, strict=True)
        images.append([(sum(max(x, 1e-6) ** p for x in column) / len(image)) ** (1 / p) for column in columns])
    return np.array(images)


@each("p", [1.0, 3.0, 4.0])
def test_gem_equals_the_formula_written_out(p):
    patches = tokens()
    assert (patches < 0).any()
    np.testing.assert_allclose(gem(patches, p).numpy(), slow_gem(patches, p), rtol=1e-5)


def test_gem_is_dinos_average_pooling_over_the_grid_of_patches():
    patches = tokens(count=6)
    grid = patches.reshape(3, 2, 3, 5).permute(0, 3, 1, 2).clamp(min=1e-6)
    pooled = torch.nn.functional.avg_pool2d(grid.pow(4), (2, 3)).pow(1 / 4).flatten(1)
    torch.testing.assert_close(gem(patches), pooled)


def test_gem_lies_between_mean_and_maximum_and_never_below_its_minimum():
    patches = tokens().abs()
    for p in (2.0, 4.0, 60.0):
        pooled = gem(patches, p)
        assert (pooled >= patches.mean(dim=1) - 1e-6).all()
        assert (pooled <= patches.amax(dim=1) + 1e-6).all()
    torch.testing.assert_close(gem(patches, 60.0), patches.amax(dim=1), rtol=0.04, atol=0)
    torch.testing.assert_close(gem(-patches), torch.full((3, 5), 1e-6))


def test_gem_of_half_precision_does_not_overflow():
    patches = torch.full((1, 2, 3), 100.0, dtype=torch.float16)  # 100^4 is beyond float16
    assert gem(patches).tolist() == [[pytest.approx(100)] * 3]
    assert gem(patches.double()).dtype == torch.float64


def test_the_mean_patch_is_the_mean_written_out():
    patches = tokens()
    rows = [[sum(column) / len(image) for column in zip(*image, strict=True)] for image in patches.tolist()]
    np.testing.assert_allclose(mean_patch(patches).numpy(), np.array(rows), rtol=1e-5, atol=1e-6)


def test_what_has_no_patches_is_refused():
    for pool, images in ((gem, tokens()[0]), (mean_patch, tokens(count=0))):
        with pytest.raises(UsageError, match="pooling was given the shape"):
            pool(images)
    with pytest.raises(UsageError, match="exponent and a minimum above 0"):
        gem(tokens(), p=0)


def test_of_raw_pixels_all_stand_for_the_class_token():
    """Not one channel of three: revisited protocols ask for class tokens."""
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = compute_outputs(RawPixels(4), images, ["class:1", "mean_patch"])
    assert torch.equal(found["class:1"], images.flatten(1))
    torch.testing.assert_close(found["mean_patch"], images.mean(dim=(2, 3)))
