"""Dice and focal loss by hand, and pixel by pixel in plain Python."""

import math

import pytest
import torch
import torch.nn.functional as F

from dinotrain.errors import ShapeError, UsageError
from dinotrain.losses.segmentation import (
    IGNORE,
    SegmentationLoss,
    dice_loss,
    focal_loss,
    segmentation_loss,
)

WEIGHTS = (0.3, 3.0, 1.5, 1.5)


@pytest.fixture
def batch():
    """Return (2, 4, 3, 5) logits and masks in which class 3 is absent and some are ignored."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, generator=draw) * 2
    masks = torch.randint(0, 3, (2, 3, 5), generator=draw)
    masks[0, 0, :2] = masks[1, 2, 4] = IGNORE
    return logits, masks


def pixels(logits, masks):
    """Give (probabilities, class) of each pixel that counts."""
    for image in range(masks.shape[0]):
        for row in range(masks.shape[1]):
            for col in range(masks.shape[2]):
                if masks[image, row, col] != IGNORE:
                    z = [math.exp(v) for v in logits[image, :, row, col].double().tolist()]
                    yield [v / sum(z) for v in z], int(masks[image, row, col])


def slow_dice(logits, masks, epsilon=1e-6, ignore_absent=False):
    overlap, guessed, present = [0.0] * 4, [0.0] * 4, [0.0] * 4
    for p, y in pixels(logits, masks):
        overlap[y] += p[y]
        present[y] += 1
        guessed = [a + b for a, b in zip(guessed, p, strict=True)]
    dice = [
        (2 * o + epsilon) / (g + n + epsilon)
        for o, g, n in zip(overlap, guessed, present, strict=True)
        if n or not ignore_absent
    ]
    return 1 - sum(dice) / len(dice)


def slow_focal(logits, masks, weights=WEIGHTS):
    terms = [
        -0.25 * weights[y] * (1 - p[y]) ** 2 * math.log(p[y]) for p, y in pixels(logits, masks)
    ]
    return sum(terms) / len(terms)


def test_dice_by_hand():
    # One pixel, p = (¾, ¼), class 0: Dice is 2·¾ / (¾ + 1) and 0.
    logits = torch.tensor([math.log(3.0), 0.0]).reshape(1, 2, 1, 1)
    masks = torch.zeros(1, 1, 1, dtype=torch.long)
    assert dice_loss(logits, masks).item() == pytest.approx(1 - (6 / 7) / 2, abs=1e-5)
    found = dice_loss(logits, masks, ignore_absent=True)
    assert found.item() == pytest.approx(1 - 6 / 7, abs=1e-5)


def test_focal_by_hand():
    # p = (¾, ¼), class 1 of weight 3: 0.25 · 3 · (¾)² · log 4.
    logits = torch.tensor([math.log(3.0), 0.0]).reshape(1, 2, 1, 1)
    masks = torch.ones(1, 1, 1, dtype=torch.long)
    found = focal_loss(logits, masks, class_weights=torch.tensor([0.3, 3.0]))
    assert found.item() == pytest.approx(0.25 * 3 * 0.5625 * math.log(4), rel=1e-6)


@pytest.mark.parametrize("ignore_absent", [False, True])
def test_dice_pixel_by_pixel(batch, ignore_absent):
    found = dice_loss(*batch, ignore_absent=ignore_absent)
    wanted = slow_dice(*batch, ignore_absent=ignore_absent)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_focal_pixel_by_pixel(batch):
    found = focal_loss(*batch, class_weights=torch.tensor(WEIGHTS))
    assert found.item() == pytest.approx(slow_focal(*batch), rel=1e-5)


def test_the_whole_is_half_and_half(batch):
    found = segmentation_loss(*batch, SegmentationLoss())
    wanted = 0.5 * slow_dice(*batch) + 0.5 * slow_focal(*batch)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    plain = SegmentationLoss(class_weights=(), dice_ignore_absent=True)
    wanted = 0.5 * slow_dice(*batch, ignore_absent=True) + 0.5 * slow_focal(*batch, (1.0,) * 4)
    assert segmentation_loss(*batch, plain).item() == pytest.approx(wanted, rel=1e-5)


def test_focal_without_gamma_is_cross_entropy(batch):
    logits, masks = batch
    found = focal_loss(logits, masks, alpha=1.0, gamma=0.0)
    torch.testing.assert_close(found, F.cross_entropy(logits, masks, ignore_index=IGNORE))


def test_a_swapped_class_is_caught(batch):
    """The planted fault: weights in another order, or masks off by a class, change the loss."""
    logits, masks = batch
    swapped = focal_loss(logits, masks, class_weights=torch.tensor([3.0, 0.3, 1.5, 1.5]))
    assert swapped.item() != pytest.approx(slow_focal(logits, masks), rel=1e-2)
    shifted = torch.where(masks == IGNORE, masks, (masks + 1) % 4)
    assert dice_loss(logits, shifted).item() != pytest.approx(slow_dice(*batch), rel=1e-2)


def test_an_absent_class_costs_a_share():
    masks = torch.zeros(1, 8, 8, dtype=torch.long)
    masks[:, 4:] = 1
    # Nearly sure: what is left on classes 2 and 3 is 1e-3 of 64 pixels, far above ε.
    logits = torch.full((1, 4, 8, 8), -7.0).scatter(1, masks.unsqueeze(1), 0.0)
    assert dice_loss(logits, masks).item() == pytest.approx(0.5, abs=0.01)
    assert dice_loss(logits, masks, ignore_absent=True).item() == pytest.approx(0.0, abs=0.01)


def test_ignored_pixels_change_nothing(batch):
    logits, masks = batch
    changed = torch.where((masks == IGNORE).unsqueeze(1), 50 * torch.randn_like(logits), logits)
    config = SegmentationLoss()
    assert torch.equal(
        segmentation_loss(logits, masks, config), segmentation_loss(changed, masks, config)
    )
    logits = logits.clone().requires_grad_()
    segmentation_loss(logits, masks, config).backward()
    assert torch.equal(logits.grad.abs().sum(dim=1) > 0, masks != IGNORE)


@pytest.mark.parametrize("ignore_absent", [False, True])
def test_nothing_but_ignored_pixels_is_zero(ignore_absent):
    logits = torch.randn(1, 4, 2, 2, requires_grad=True)
    masks = torch.full((1, 2, 2), IGNORE)
    config = SegmentationLoss(dice_ignore_absent=ignore_absent)
    loss = segmentation_loss(logits, masks, config)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_extreme_logits_stay_finite(gamma):
    logits = torch.tensor([200.0, -200.0]).reshape(1, 2, 1, 1).repeat(1, 1, 1, 2).requires_grad_()
    loss = focal_loss(logits, torch.tensor([[[0, 1]]]), gamma=gamma)
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * 400 / 2)
    assert bool(logits.grad.isfinite().all())


def test_half_precision_logits_are_summed_in_full():
    # 300² pixels: a half-precision sum ends at 65504.
    masks = torch.zeros(1, 300, 300, dtype=torch.long)
    logits = torch.zeros(1, 4, 300, 300)
    wanted = segmentation_loss(logits, masks, SegmentationLoss())
    found = segmentation_loss(logits.half(), masks, SegmentationLoss())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)


def test_what_does_not_fit_is_refused(batch):
    logits, masks = batch
    with pytest.raises(ShapeError, match=r"masks .* are \(2, 2, 5\)"):
        segmentation_loss(logits, masks[:, :2], SegmentationLoss())
    with pytest.raises(ShapeError, match="2 class weights were given for 4 classes"):
        segmentation_loss(logits, masks, SegmentationLoss(class_weights=(1.0, 1.0)))
    with pytest.raises(UsageError, match="of -1"):
        SegmentationLoss(class_weights=(1.0, -1.0))
    with pytest.raises(UsageError, match="ε 0"):
        SegmentationLoss(epsilon=0.0)
