import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchssl.eval.whitening import Whitening
from patchssl.runtime.errors import DataError, UsageError

D = 24


def some_features(n=600, seed=0):
    """Correlated, of unequal scales, far from the origin."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(99).normal(size=(D, D)))[0]
    return (rng.normal(size=(n, D)) * np.geomspace(1, 0.05, D) @ turn + np.linspace(-1, 2, D)).astype(np.float32)


def cosines(a, b):
    return (F.normalize(torch.as_tensor(a)) @ F.normalize(torch.as_tensor(b)).T).numpy()


@pytest.mark.parametrize("dims", [D, 10])
def test_pca_equals_faiss_but_for_signs_and_one_factor(dims):
    train, queries = some_features(), some_features(50, seed=1)
    theirs = faiss.PCAMatrix(D, dims, -0.5, False)
    theirs.train(train)
    # FAISS sums where a covariance is a mean, and in float32
    expected = np.abs(theirs.apply(queries)) * np.sqrt(len(train))
    np.testing.assert_allclose(np.abs(Whitening.fit(train, "pca", dims=dims).apply(queries)), expected, atol=2e-2)


def test_pca_finds_what_faiss_finds_by_its_factory_string():
    train, database, queries = some_features(), some_features(80, seed=1), some_features(40, seed=2)
    index = faiss.index_factory(D, f"PCAW{D},L2norm,Flat")
    index.train(train)
    index.add(database)
    distances, ids = index.search(queries, 5)
    white = Whitening.fit(train, "pca")
    ours = cosines(white.apply(queries), white.apply(database))
    # FAISS forms the covariance in float32
    np.testing.assert_allclose(np.take_along_axis(ours, ids, 1), 1 - distances / 2, atol=1e-3)
    np.testing.assert_allclose(-np.sort(-ours, axis=1)[:, :5], 1 - distances / 2, atol=1e-3)


def test_pca_makes_its_own_images_centered_and_uncorrelated():
    train = some_features()
    white = Whitening.fit(train, "pca").apply(train).astype(np.float64)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(D), atol=1e-4)


def test_dino_is_the_inverse_of_the_uncentered_second_moment_around_the_mean():
    """Inner products afterwards are (x - mean)^T M^-1 (y - mean), M the mean of x x^T: no eigenvector needed."""
    train, queries = some_features(), some_features(50, seed=1)
    double = train.astype(np.float64)
    moved = queries - double.mean(axis=0)
    expected = moved @ np.linalg.solve(double.T @ double / len(double), moved.T)
    white = Whitening.fit(train, "dino").apply(queries)
    np.testing.assert_allclose(white @ white.T, expected, atol=2e-3)
    centered = Whitening.fit(train, "pca").apply(queries)
    assert np.abs(cosines(white, white) - cosines(centered, centered)).max() > 0.05  # the rules do differ


def test_dino_floors_eigenvalues_at_a_share_of_the_largest():
    """Along the axes, second moments 4, 1 and 1e-9: the last is taken for 4e-5."""
    train = np.diag([2.0, 1.0, np.sqrt(1e-9)]) * np.sqrt(3)
    train = np.concatenate([train, -train])
    white = Whitening.fit(train, "dino").apply(np.eye(3))
    np.testing.assert_allclose(np.abs(white), np.diag([1 / 2, 1, 1 / np.sqrt(4e-5)]), atol=1e-4)


@pytest.mark.parametrize("rule", ["dino", "pca"])
def test_fewer_dimensions_are_the_first_axes_of_all(rule):
    train = some_features()
    full, part = (Whitening.fit(train, rule, dims=dims).apply(train) for dims in (None, 7))
    assert part.shape == (600, 7)
    np.testing.assert_allclose(np.abs(part), np.abs(full[:, :7]), atol=1e-5)


def test_arrays_give_arrays_and_tensors_give_tensors_in_float32():
    train = some_features()
    by_array = Whitening.fit(train.astype(np.float64)).apply(train.astype(np.float64))
    by_tensor = Whitening.fit(torch.tensor(train)).apply(torch.tensor(train))
    assert (type(by_array), by_array.dtype) == (np.ndarray, np.float32)
    assert (type(by_tensor), by_tensor.dtype) == (torch.Tensor, torch.float32)
    np.testing.assert_array_equal(by_array, by_tensor.numpy())


def test_blocks_of_rows_do_not_show_and_are_reported(monkeypatch):
    train, calls = some_features(), []
    whole = Whitening.fit(train).apply(train)
    monkeypatch.setattr("patchssl.eval.whitening._ROWS", 250)
    blocks = Whitening.fit(train, progress=lambda *call: calls.append(call)).apply(train)
    assert calls == [(250, 600), (500, 600), (600, 600)]
    np.testing.assert_allclose(np.abs(blocks), np.abs(whole), atol=1e-4)


@pytest.mark.parametrize("rule", ["dino", "pca"])
def test_too_few_images_are_refused_with_the_number_needed(rule):
    with pytest.raises(DataError, match=r"23 whitening images are too few .* at least 24 are needed"):
        Whitening.fit(some_features(D - 1), rule)


def test_axes_without_variance_are_not_blown_up():
    train = some_features()
    train[:, 5] = 1e-6  # a dimension that GeM always clamps
    with pytest.raises(DataError, match=r"vary along 23 of 24 dimensions.* keep at most 23"):
        Whitening.fit(train, "pca")
    assert np.isfinite(Whitening.fit(train, "pca", dims=23).apply(train)).all()
    assert np.isfinite(Whitening.fit(train, "dino").apply(train)).all()
    for rule in ("dino", "pca"):
        with pytest.raises(DataError, match="vary along 0 of 24"):
            Whitening.fit(np.zeros_like(train), rule)


def test_what_cannot_be_whitened_is_refused():
    train = some_features()
    with pytest.raises(UsageError, match="rule 'pcaw' is unknown; did you mean 'pca'"):
        Whitening.fit(train, "pcaw")
    for dims in (0, D + 1):
        with pytest.raises(UsageError, match="the features have 24"):
            Whitening.fit(train, dims=dims)
    with pytest.raises(DataError, match="features of 23 dimensions cannot be whitened as those of 24"):
        Whitening.fit(train).apply(train[:, 1:])
    broken = train.copy()
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="1 of the 600 whitening features hold NaN or infinity, first in row 3"):
        Whitening.fit(broken)
    with pytest.raises(DataError, match="1 of the 600 given features hold NaN"):
        Whitening.fit(train).apply(broken)
