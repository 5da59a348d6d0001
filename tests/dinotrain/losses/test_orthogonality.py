"""Orthogonality of hidden layers and of gradients, by hand and against slow formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinotrain.errors import ShapeError
from dinotrain.losses.orthogonality import gradient_overlap, soft_orthogonality


def test_soft_orthogonality_by_hand():
    # WWᵀ − I = [[3, 2], [2, 0]]: (9 + 4 + 4 + 0) / 4.
    weight = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert soft_orthogonality([weight]).item() == pytest.approx(17 / 4)
    assert soft_orthogonality([weight.T]).item() == pytest.approx(17 / 4)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_orthonormal_layers_cost_nothing_and_others_do(shape):
    weight = nn.init.orthogonal_(torch.empty(shape), generator=torch.Generator().manual_seed(0))
    # Squares of float32 rounding.
    assert soft_orthogonality([weight]).item() < 1e-12
    assert soft_orthogonality([1.1 * weight]).item() > 1e-3


def test_soft_orthogonality_entry_by_entry():
    draw = torch.Generator().manual_seed(0)
    linear, kernel = torch.randn(6, 3, generator=draw), torch.randn(2, 3, 2, 2, generator=draw)
    wanted = []
    for matrix in (linear.T, kernel.reshape(2, 12)):
        total = 0.0
        for i, a in enumerate(matrix.double()):
            for j, b in enumerate(matrix.double()):
                total += (float(a @ b) - (i == j)) ** 2
        wanted.append(total / len(matrix) ** 2)
    found = soft_orthogonality([linear, kernel])
    assert found.item() == pytest.approx(sum(wanted) / 2, rel=1e-5)


def test_soft_orthogonality_pulls_a_layer_straight():
    weight = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    first = soft_orthogonality([weight]).item()
    for _ in range(300):
        optimizer.zero_grad()
        soft_orthogonality([weight]).backward()
        optimizer.step()
    assert soft_orthogonality([weight]).item() < 1e-4 * first


def test_soft_orthogonality_of_nothing_and_of_a_bias():
    assert soft_orthogonality([]).item() == 0.0
    with pytest.raises(ShapeError, match=r"\(5,\)"):
        soft_orthogonality([torch.zeros(5)])


def test_gradient_overlap_by_hand():
    embedding = torch.zeros(2, 2, requires_grad=True)
    along = embedding[:, 0].sum()
    across = embedding[:, 1].sum()
    slanted = embedding.sum()
    assert gradient_overlap([along, 3 * along], embedding).item() == pytest.approx(1.0)
    assert gradient_overlap([along, -along], embedding).item() == pytest.approx(1.0)
    assert gradient_overlap([along, across], embedding).item() == 0.0
    # cos² is 0, ½ and ½.
    found = gradient_overlap([along, across, slanted], embedding)
    assert found.item() == pytest.approx(1 / 3)


def test_gradient_overlap_against_separate_backward_passes():
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 8, generator=draw)
    values = torch.randn(4, 8, generator=draw)
    gradients = []
    for row in weights:
        leaf = values.clone().requires_grad_()
        (leaf @ row).tanh().square().mean().backward()
        gradients.append(leaf.grad.flatten())
    cosines = [
        F.cosine_similarity(gradients[i], gradients[j], dim=0).item() ** 2
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    embedding = values.clone().requires_grad_()
    losses = [(embedding @ row).tanh().square().mean() for row in weights]
    found = gradient_overlap(losses, embedding)
    assert found.item() == pytest.approx(sum(cosines) / 3, rel=1e-5)
    assert not found.requires_grad
    # The graph is still there for the step that follows.
    sum(losses).backward()
    assert embedding.grad is not None


def test_gradients_at_several_embeddings_are_one_vector():
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 8, generator=draw, requires_grad=True)
    left, right = (part.detach().requires_grad_() for part in (whole[:, :5], whole[:, 5:]))
    weights = torch.randn(2, 8, generator=draw)

    def losses(x: torch.Tensor) -> list[torch.Tensor]:
        return [(x @ row).tanh().square().sum() for row in weights]

    found = gradient_overlap(losses(torch.cat((left, right), dim=1)), (left, right))
    assert found.item() == pytest.approx(gradient_overlap(losses(whole), whole).item(), rel=1e-6)


def test_a_task_without_a_gradient_overlaps_with_none():
    embedding = torch.ones(2, 2, requires_grad=True)
    other = torch.ones(2, requires_grad=True)
    found = gradient_overlap([embedding.sum(), other.sum(), torch.zeros(())], embedding)
    assert found.item() == 0.0
    assert gradient_overlap([embedding.sum()], embedding).item() == 0.0
