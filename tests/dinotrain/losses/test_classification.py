"""Cross-entropy by hand, label by label, and against torch and scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from dinotrain.errors import ShapeError
from dinotrain.losses.classification import balanced_class_weights, cross_entropy

WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 4.0])


@pytest.fixture
def batch():
    """Return (6, 2, 1, 4) logits, classes and where they are known."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 2, 1, 4, generator=draw)
    classes = torch.randint(0, 4, (6, 1), generator=draw)
    mask = torch.ones(6, 1, dtype=torch.bool)
    mask[2] = mask[5] = False
    classes[2] = -7
    return logits, classes, mask


def test_cross_entropy_by_hand():
    # p = (½, ¼, ¼): class 0 of weight 1 and class 1 of weight 3.
    logits = torch.log(torch.tensor([2.0, 1.0, 1.0])).repeat(2, 1).reshape(2, 1, 1, 3)
    classes, mask = torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.bool)
    assert cross_entropy(logits, classes, mask).item() == pytest.approx(1.5 * math.log(2))
    found = cross_entropy(logits, classes, mask, torch.tensor([1.0, 3.0, 1.0]))
    assert found.item() == pytest.approx((math.log(2) + 3 * math.log(4)) / 4)


def test_cross_entropy_label_by_label(batch):
    logits, classes, mask = batch
    total = weight = 0.0
    for sample in range(6):
        if not mask[sample]:
            continue
        y = int(classes[sample])
        for member in range(2):
            z = logits[sample, member, 0].double()
            total -= WEIGHTS[y].item() * math.log(math.exp(z[y]) / sum(math.exp(v) for v in z))
            weight += WEIGHTS[y].item()
    found = cross_entropy(logits, classes, mask, WEIGHTS)
    assert found.item() == pytest.approx(total / weight, rel=1e-5)


def test_cross_entropy_is_torchs_where_all_is_known(batch):
    logits, classes, mask = batch
    logits, classes = logits[mask.flatten()][:, :1], classes[mask.flatten()]
    wanted = F.cross_entropy(logits[:, 0, 0], classes[:, 0], weight=WEIGHTS)
    found = cross_entropy(logits, classes, torch.ones_like(classes, dtype=torch.bool), WEIGHTS)
    torch.testing.assert_close(found, wanted)


def test_masked_labels_give_no_gradient(batch):
    logits, classes, mask = batch
    logits = logits.clone().requires_grad_()
    cross_entropy(logits, classes, mask).backward()
    assert torch.equal(logits.grad.abs().sum(dim=(1, 3)) > 0, mask)


@pytest.mark.parametrize("weights", [None, torch.zeros(4)])
def test_nothing_that_counts_is_zero_not_nan(batch, weights):
    logits, classes, mask = batch
    logits = logits.clone().requires_grad_()
    known = mask if weights is not None else torch.zeros_like(mask)
    loss = cross_entropy(logits, classes, known, weights)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_weights_of_another_number_are_refused(batch):
    with pytest.raises(ShapeError, match=r"\(3,\) and there are 4 classes"):
        cross_entropy(*batch, torch.ones(3))


def test_balanced_weights_are_scikit_learns():
    labels = np.repeat([0, 1, 2], [50, 10, 5])
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced_class_weights([50, 10, 5]).tolist() == pytest.approx(wanted.tolist())
    # An empty class takes nothing from the others.
    assert balanced_class_weights([50, 0, 10, 5]).tolist() == pytest.approx(
        [wanted[0], 0.0, wanted[1], wanted[2]]
    )
