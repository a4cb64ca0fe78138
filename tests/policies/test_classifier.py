from pathlib import Path

import numpy as np
import pytest

from policies.classifier import CategoryHead


def _tiny() -> CategoryHead:
    """Two inputs, two units that copy them, two labels that read one unit each."""
    eye = np.eye(2, dtype=np.float32)
    zero = np.zeros(2, np.float32)
    return CategoryHead(("left", "right"), "toy", eye, zero, 4 * eye, zero)


def test_the_likeliest_label_with_its_probability() -> None:
    label, probability = _tiny().classify(np.array([1.0, 0.0], np.float32))
    assert label == "left"
    assert probability == pytest.approx(np.exp(4) / (np.exp(4) + 1), rel=1e-5)


def test_probabilities_add_up_for_many_vectors_and_huge_scores() -> None:
    vectors = np.array([[1, 0], [0, 1], [-1, -1], [1e6, 0]], np.float32)
    shares = _tiny().probabilities(vectors)
    assert shares.shape == (4, 2)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(shares[2], 0.5)


def test_fits_only_vectors_of_its_embedder() -> None:
    head = _tiny()
    assert head.fits("toy/int8/0123")
    assert not head.fits("toy-2/int8/0123")
    assert not head.fits("https://example.test/v1/embeddings/toy/2")


def test_the_shipped_head_loads_and_names_the_known_categories() -> None:
    head = CategoryHead.load()
    assert head.embedder == "all-MiniLM-L6-v2"
    assert "general" in head.labels
    assert head.hidden.shape[0] == 384
    assert head.out.shape[1] == len(head.labels) == 9


def test_a_file_that_is_no_head_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="pickled"):
        CategoryHead.load(path)
