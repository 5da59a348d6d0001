"""Pass: norms and constants of a head; what converters would fold by themselves is folded before
weights are rounded, so that all targets round the same numbers.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import HEAD_FOLDED
from dinoexport.passes.fold_layer_norms import fold_affine
from dinotrain.heads.branch import BranchHead
from dinotrain.heads.query import QueryHead, QueryLayer


@final
@dataclass(frozen=True)
class FoldHead(Pass):
    """Fold LayerNorms into the linear layers that read them, and work out a query decoder's first
    self-attention, which no picture changes.

    Before:  linear(γ·norm(x) + β; W, b); queries + self(norm(queries)), for each picture
    After:   linear(norm(x); γ·W, b + W·β); queries that told each other are constants
    """

    name = "fold_head"
    ensures = frozenset({HEAD_FOLDED})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        model.head = fold_head_(model.head)


def fold_head_(head: nn.Module) -> nn.Module:
    """Fold norms and constants of a head, in place; for inference only. Returns the head to use."""
    if isinstance(head, BranchHead):
        for member in head.members:
            for branch in head.branches:
                _fold_sequence_(member[branch.name])  # type: ignore[index]
        return head
    return FoldedQueryHead(head) if isinstance(head, QueryHead) else head


def _fold_sequence_(layers: nn.Sequential) -> None:
    first, *rest = layers
    if isinstance(first, nn.LayerNorm) and isinstance(rest[0], nn.Linear):
        layers[0] = fold_affine(first, [rest[0]])


class FoldedQueryHead(nn.Module):
    """A query decoder whose first layer starts from constants: no picture changes the queries, so
    what they tell each other, and what they ask for, is worked out once.

    Args:
        head: eval mode; taken apart.
    """

    def __init__(self, head: QueryHead) -> None:
        super().__init__()
        first, *later = (layer for layer in head.layers if isinstance(layer, QueryLayer))
        with torch.no_grad():
            start = first.exchange(head.queries)
            asked = first.cross_attention.q(first.norm2(start))
            marks = {
                name: nn.Parameter(head.project.bias + head.origin[name].flatten())
                for name in head.inputs
            }
        self.inputs = head.inputs
        self.start = nn.Parameter(start)
        self.asked = nn.Parameter(asked)
        for layer in later:
            attention = layer.self_attention
            layer.norm1 = fold_affine(layer.norm1, [attention.q, attention.k, attention.v])
            layer.norm2 = fold_affine(layer.norm2, [layer.cross_attention.q])
        for layer in (first, *later):
            _fold_into_mlp_(layer)
        with torch.no_grad():
            for mark in marks.values():
                mark.add_(head.project.weight @ head.norm.bias)
            head.project.weight.mul_(head.norm.weight)
        self.norm = nn.LayerNorm(
            list(head.norm.normalized_shape), eps=head.norm.eps, elementwise_affine=False
        )
        self.weight = nn.Parameter(head.project.weight.detach())
        self.marks = nn.ParameterDict(marks)
        self.first_attention = first.cross_attention
        self.first_norm = first.norm3
        self.first_mlp = first.mlp
        self.later = nn.ModuleList(later)
        self.outputs = head.outputs
        self.final_norm = fold_affine(head.final_norm, list(head.outputs))  # type: ignore[arg-type]

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """As the head's: {input: (B, N, in_width)} → (B, 1, targets, width)."""
        marked = [
            nn.functional.linear(self.norm(tokens[name]), self.weight, self.marks[name])
            for name in self.inputs
        ]
        memory = torch.cat(marked, dim=1)
        batch = memory.shape[0]
        asked = self.asked.expand(batch, -1, -1)
        queries = self.start.expand(batch, -1, -1) + self.first_attention.look(asked, memory)
        queries = queries + self.first_mlp(self.first_norm(queries))
        for layer in self.later:
            queries = layer(queries, memory)
        answers = self.final_norm(queries)
        logits = [output(answers[:, index]) for index, output in enumerate(self.outputs)]
        return torch.stack(logits, dim=1).unsqueeze(1)


def _fold_into_mlp_(layer: QueryLayer) -> None:
    linear = layer.mlp[0]
    if isinstance(linear, nn.Linear):
        layer.norm3 = fold_affine(layer.norm3, [linear])
