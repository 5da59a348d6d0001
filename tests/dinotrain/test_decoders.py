"""Class maps: the likeliest class, whole numbers, the first of equal ones."""

import torch

from dinotrain.decoders import ClassMapDecoder


def test_every_pixel_gets_its_likeliest_class():
    logits = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = ClassMapDecoder()(logits)
    assert list(found) == ["class_map"]
    assert (found["class_map"].dtype, found["class_map"].shape) == (torch.int32, (2, 3, 4))
    best = logits.max(dim=1).values
    chosen = logits.gather(1, found["class_map"].long()[:, None])[:, 0]
    assert torch.equal(chosen, best)


def test_the_first_of_equal_classes_wins():
    logits = torch.zeros(1, 4, 1, 3)
    logits[0, 2:, 0, 1] = 1
    logits[0, 3, 0, 2] = 1
    assert ClassMapDecoder()(logits)["class_map"].tolist() == [[[0, 2, 3]]]
