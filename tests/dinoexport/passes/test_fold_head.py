"""Folded heads: the same function, and nothing left that a converter would fold by itself."""

import pytest
import torch
from torch import nn

from dinoexport.passes.fold_head import fold_head_
from dinotrain.heads.branch import BranchHead, BranchSpec, HeadConfig
from dinotrain.heads.query import QueryConfig, QueryHead

GAZES = ("primary", "up")


def randomise_(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def norms(module: nn.Module) -> list[nn.LayerNorm]:
    return [m for m in module.modules() if isinstance(m, nn.LayerNorm)]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_query_decoder(layers):
    config = QueryConfig(dim=16, layers=layers, heads=2, hidden=24)
    head = randomise_(QueryHead(GAZES, 12, 3, 8, config))
    tokens = {name: torch.randn(2, 9, 12) for name in GAZES}
    with torch.no_grad():
        wanted = head(tokens)
        count = len(norms(head))
        folded = fold_head_(head)
        # Products in another order, a few layers deep, on values of some units.
        torch.testing.assert_close(folded(tokens), wanted, atol=2e-5, rtol=1e-5)
    # The two norms of the first layer that read the queries alone are gone.
    assert len(norms(folded)) == count - 2
    assert not any(norm.elementwise_affine for norm in norms(folded))


@pytest.mark.parametrize("kind", ["linear", "probe", "mlp", "ensemble"])
def test_a_branch_head(kind):
    branches = [BranchSpec("a", 12, 2), BranchSpec("b", 12, 1)]
    head = randomise_(BranchHead(branches, 8, HeadConfig(kind=kind, hidden=16, members=2)))
    vectors = {name: torch.randn(2, 12) for name in "ab"}
    with torch.no_grad():
        wanted = head(vectors)
        folded = fold_head_(head)
        torch.testing.assert_close(folded(vectors), wanted, atol=1e-5, rtol=1e-5)
    assert not any(norm.elementwise_affine for norm in norms(folded))
