"""Query decoder: one learned query per target looks through the patch tokens of all images.

It takes the place of pool and branch head together, and gives logits of a branch head's shape,
(B, 1, targets, width). Source: METHODS B6.
"""

from collections.abc import Mapping, Sequence

import msgspec
import torch
from torch import Tensor, nn

from dinotrain.errors import ShapeError, UsageError


class QueryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Size of a query decoder; ``hidden`` is inside its MLPs."""

    dim: int = 256
    layers: int = 2
    heads: int = 4
    hidden: int = 1024
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a width that the heads do not divide."""
        if min(self.dim, self.layers, self.heads, self.hidden) < 1 or self.dim % self.heads:
            raise UsageError(
                f"a query decoder of width {self.dim}, {self.layers} layers, {self.heads} heads "
                f"and hidden width {self.hidden} cannot be built: all are 1 or more, and the heads "
                "divide the width"
            )


class CrossAttention(nn.Module):
    """Multi-head attention of queries over a memory, at most four dimensions at any point."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(B, Q, D) and (B, T, D) → (B, Q, D)."""
        return self.look(self.q(queries), memory)

    def look(self, projected: Tensor, memory: Tensor) -> Tensor:
        """Projected queries, (B, Q, D), and (B, T, D) → (B, Q, D)."""
        batch, count, dim = projected.shape
        head_dim = dim // self.heads
        q, k, v = (
            part.reshape(batch, part.shape[1], self.heads, head_dim).transpose(1, 2)
            for part in (projected, self.k(memory), self.v(memory))
        )
        # Plain products: the queries are few, and an exported SDPA carries NaN guards that
        # delegates refuse.
        weights = ((q * head_dim**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, dim))


class QueryLayer(nn.Module):
    """q += self(norm1 q); q += cross(norm2 q, memory); q += mlp(norm3 q)."""

    def __init__(self, config: QueryConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim)
        self.self_attention = CrossAttention(dim, config.heads)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attention = CrossAttention(dim, config.heads)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, dim),
        )
        self.drop = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(B, Q, D) and (B, T, D) → (B, Q, D)."""
        queries = self.exchange(queries)
        queries = queries + self.drop(self.cross_attention(self.norm2(queries), memory))
        return queries + self.drop(self.mlp(self.norm3(queries)))

    def exchange(self, queries: Tensor) -> Tensor:
        """Let the queries read each other, (B, Q, D) → (B, Q, D)."""
        x = self.norm1(queries)
        return queries + self.drop(self.self_attention(x, x))


class QueryHead(nn.Module):
    """Patch tokens of every image of a sample → logits, one learned query per target.

    Tokens of one image are normalised, projected, and marked by a learned embedding of which image
    (which gaze) they are from; the queries look through those of all images at once.

    Args:
        inputs: names of the images, in the order in which their tokens are joined.
        in_width: of the tokens.
        targets: how many, in the order of the logits.
        width: logits per target.
        config: size.

    Raises:
        UsageError: no input or no target.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        in_width: int,
        targets: int,
        width: int,
        config: QueryConfig,
    ) -> None:
        super().__init__()
        if not inputs or targets < 1:
            raise UsageError(
                f"a query decoder reads at least one image and gives at least one target, not "
                f"{len(inputs)} and {targets}"
            )
        self.inputs = tuple(inputs)
        dim = config.dim
        self.norm = nn.LayerNorm(in_width)
        self.project = nn.Linear(in_width, dim)
        self.origin = nn.ParameterDict({name: _embedding(1, dim) for name in inputs})
        self.queries = _embedding(targets, dim)
        self.layers = nn.ModuleList(QueryLayer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(dim)
        self.outputs = nn.ModuleList(nn.Linear(dim, width) for _ in range(targets))

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Read all images of a batch of samples.

        Args:
            tokens: {input: (B, N, in_width)}; N may differ between inputs.

        Returns:
            (B, 1, targets, width).

        Raises:
            ShapeError: an input is missing.
        """
        missing = [name for name in self.inputs if name not in tokens]
        if missing:
            raise ShapeError(
                f"the query decoder reads {', '.join(self.inputs)}, and there are no tokens of "
                f"'{missing[0]}'"
            )
        marked = [self.project(self.norm(tokens[n])) + self.origin[n] for n in self.inputs]
        memory = torch.cat(marked, dim=1)
        queries = self.queries.expand(memory.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, memory)
        answers = self.final_norm(queries)
        logits = [output(answers[:, index]) for index, output in enumerate(self.outputs)]
        return torch.stack(logits, dim=1).unsqueeze(1)

    def output_weights(self) -> list[Tensor]:
        """Weights of the output layers, one (targets, width, dim): all read the same space."""
        return [torch.stack([output.weight for output in self.outputs])]  # type: ignore[arg-type]

    def hidden_weights(self) -> list[Tensor]:
        """Weights of all linear layers before the output layers, (out, in) each."""
        outputs = set(self.outputs)
        return [
            layer.weight
            for layer in self.modules()
            if isinstance(layer, nn.Linear) and layer not in outputs
        ]

    @torch.no_grad()
    def set_output_bias_(self, bias: Tensor) -> None:
        """Set the output biases, (targets, width), in place: where training starts."""
        for output, row in zip(self.outputs, bias, strict=True):
            output.bias.copy_(row)  # type: ignore[union-attr]


def _embedding(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(1, count, dim), std=0.02))
