"""The check before timing: another model is caught, rounding is not."""

import numpy as np
import pytest

from dinobench.peers.agreement import MismatchError, check, compare
from dinobench.peers.candidates import our_candidate

EXPECTED = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])


def moved(by: float) -> np.ndarray:
    return EXPECTED + by * np.array([1, -1, 0, 0])


def test_rounding_passes_and_is_measured() -> None:
    found = check(our_candidate("onnx", "fp32"), moved(1e-6), EXPECTED)
    assert found.worst == pytest.approx(1e-6)
    assert found.sqnr_db > 90


def test_another_model_ends_the_run() -> None:
    with pytest.raises(MismatchError, match=r"ours-onnx-fp32.*another model"):
        check(our_candidate("onnx", "fp32"), moved(2e-4), EXPECTED)


def test_an_int8_candidate_may_differ_and_says_how_far() -> None:
    found = check(our_candidate("onnx", "w8a8"), moved(0.05), EXPECTED)
    assert found.worst == pytest.approx(0.05)
    assert found.sqnr_db < 30


def test_sqnr_is_of_the_logits_whatever_their_mean() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 4))
    noise = 0.01 * rng.standard_normal((5, 4))
    noise -= noise.mean(axis=1, keepdims=True)
    centred = logits - logits.mean(axis=1, keepdims=True)
    expected = 10 * np.log10((centred**2).sum() / (noise**2).sum())

    def soft(x):
        return np.exp(x + 3) / np.exp(x + 3).sum(axis=1, keepdims=True)

    assert compare(soft(logits + noise), soft(logits)).sqnr_db == pytest.approx(expected)


@pytest.mark.parametrize(
    "found", [EXPECTED[:1], np.full_like(EXPECTED, np.nan)], ids=["shape", "nan"]
)
def test_what_cannot_be_compared_ends_the_run(found) -> None:
    with pytest.raises(MismatchError, match="Nothing was timed"):
        check(our_candidate("onnx", "w8a8"), found, EXPECTED)
