"""Heads over pooled features: linear ones, MLP, and a deep ensemble of MLPs, per branch of a task.

A branch is a set of targets that reads the same vector; a task names its branches. All kinds, and
the query decoder, give logits of one shape, (B, members, targets, width), so that nothing
downstream asks which it is. Source: METHODS B6.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from dinotrain.errors import ShapeError, UsageError
from dinotrain.heads.query import QueryConfig
from dinotrain.heads.segmentation import DecoderConfig

HeadKind = Literal["linear", "probe", "mlp", "ensemble", "query", "multiscale"]
Join = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""{input: (B, F)} pooled features → what the branches read, {branch: (B, in_width)}."""


class HeadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The kind of head; ``members`` counts only for an ensemble, ``query`` and ``decoder`` for the
    query decoder and the ``multiscale`` segmentation decoder.
    """

    kind: HeadKind = "mlp"
    hidden: int = 256
    dropout: float = 0.1
    members: int = 5
    query: QueryConfig = QueryConfig()
    decoder: DecoderConfig = DecoderConfig()

    def __post_init__(self) -> None:
        """Refuse an ensemble of fewer than two."""
        if self.kind == "ensemble" and self.members < 2:
            raise UsageError(f"an ensemble has at least 2 members, not {self.members}")

    @property
    def count(self) -> int:
        """Members that are built: one unless it is an ensemble."""
        return self.members if self.kind == "ensemble" else 1


class BranchSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One branch: its name, how many numbers it reads, and how many targets it gives."""

    name: str
    in_width: int
    targets: int


def build_mlp(in_width: int, out_width: int, config: HeadConfig) -> nn.Sequential:
    """LN → Linear → GELU → Dropout → Linear; LN → Linear for ``linear``, Linear for ``probe``."""
    if config.kind == "probe":
        return nn.Sequential(nn.Linear(in_width, out_width))
    if config.kind == "linear":
        return nn.Sequential(nn.LayerNorm(in_width), nn.Linear(in_width, out_width))
    return nn.Sequential(
        nn.LayerNorm(in_width),
        nn.Linear(in_width, config.hidden),
        nn.GELU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden, out_width),
    )


class BranchHead(nn.Module):
    """One small network per branch and member.

    Args:
        branches: in the order of their targets.
        width: logits per target.
        config: kind and size.
        join: what the branches read of the inputs' features; by default inputs are branches.
    """

    def __init__(
        self, branches: list[BranchSpec], width: int, config: HeadConfig, join: Join = dict
    ) -> None:
        super().__init__()
        self.branches = branches
        self.width = width
        self.join = join
        self.members = nn.ModuleList(
            nn.ModuleDict(
                {b.name: build_mlp(b.in_width, b.targets * width, config) for b in branches}
            )
            for _ in range(config.count)
        )

    def forward(self, pooled: Mapping[str, Tensor]) -> Tensor:
        """{input: (B, F)} → (B, members, targets, width), targets in branch order."""
        vectors = self.join(pooled)
        return torch.stack([self._member(member, vectors) for member in self.members], dim=1)

    def _member(self, member: nn.Module, vectors: dict[str, Tensor]) -> Tensor:
        parts = [
            member[b.name](vectors[b.name]).reshape(-1, b.targets, self.width)  # type: ignore[index]
            for b in self.branches
        ]
        return torch.cat(parts, dim=1)

    def output_weights(self) -> list[Tensor]:
        """Weights of each output layer, one (targets, width, hidden) per branch and member.

        Targets of one branch share their hidden space, so their rows can be compared.
        """
        return [
            member[b.name][-1].weight.reshape(b.targets, self.width, -1)  # type: ignore[index]
            for member in self.members
            for b in self.branches
        ]

    def hidden_weights(self) -> list[Tensor]:
        """Weights of the layers before the output layers, (out, in) each; none of a linear head."""
        return [
            layer.weight
            for member in self.members
            for b in self.branches
            for layer in member[b.name][:-1]  # type: ignore[index]
            if isinstance(layer, nn.Linear)
        ]

    @torch.no_grad()
    def set_output_bias_(self, bias: Tensor) -> None:
        """Set the output biases of every member, (targets, width), in place: where training starts.

        Raises:
            ShapeError: the biases are not one row per target.
        """
        wanted = (sum(b.targets for b in self.branches), self.width)
        if tuple(bias.shape) != wanted:
            raise ShapeError(
                f"output biases have shape {tuple(bias.shape)}, and the head has {wanted[0]} "
                f"targets of {wanted[1]} logits each; give {wanted}"
            )
        for member in self.members:
            rows = bias.split([b.targets for b in self.branches])
            for b, part in zip(self.branches, rows, strict=True):
                member[b.name][-1].bias.copy_(part.flatten())  # type: ignore[index]
