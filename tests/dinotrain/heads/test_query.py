"""The query decoder against torch's own decoder layer, and what its queries may see."""

import pytest
import torch
from torch import nn

from dinotrain.errors import ShapeError, UsageError
from dinotrain.heads.query import QueryConfig, QueryHead, QueryLayer
from dinotrain.losses.orthogonality import task_orthogonality

GAZES = ("primary", "up", "down")
SMALL = QueryConfig(dim=16, heads=4, hidden=24)


@pytest.fixture
def head() -> QueryHead:
    torch.manual_seed(0)
    return QueryHead(GAZES, 10, 3, 8, SMALL).eval()


def tokens(batch: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, 6, 10, generator=draw) for name in GAZES}


def torch_layer(layer: QueryLayer) -> nn.TransformerDecoderLayer:
    """Return torch's pre-LN decoder layer with the same weights."""
    dim, hidden = layer.mlp[3].out_features, layer.mlp[0].out_features
    peer = nn.TransformerDecoderLayer(
        dim, 4, hidden, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
    )
    state = {}
    for ours, theirs in (("self_attention", "self_attn"), ("cross_attention", "multihead_attn")):
        part = getattr(layer, ours)
        for kind in ("weight", "bias"):
            rows = [getattr(getattr(part, name), kind) for name in "qkv"]
            state[f"{theirs}.in_proj_{kind}"] = torch.cat(rows)
            state[f"{theirs}.out_proj.{kind}"] = getattr(part.proj, kind)
    for ours, theirs in (
        (layer.norm1, "norm1"),
        (layer.norm2, "norm2"),
        (layer.norm3, "norm3"),
        (layer.mlp[0], "linear1"),
        (layer.mlp[3], "linear2"),
    ):
        state |= {f"{theirs}.{name}": value for name, value in ours.state_dict().items()}
    peer.load_state_dict(state)
    return peer.eval()


def randomise_(module: nn.Module) -> None:
    """Give norms and biases values that a mistake in their place would show."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=draw))


def test_the_published_size():
    config = QueryConfig()
    assert (config.dim, config.layers, config.heads) == (256, 2, 4)


def test_a_layer_is_torchs_decoder_layer():
    torch.manual_seed(0)
    layer = QueryLayer(SMALL).eval()
    randomise_(layer)
    queries, memory = torch.randn(2, 3, 16), torch.randn(2, 18, 16)
    wanted = torch_layer(layer)(queries, memory)
    # Sums of at most 24 float32 terms, four layers deep.
    torch.testing.assert_close(layer(queries, memory), wanted, atol=1e-5, rtol=1e-5)


def test_a_layer_whose_attentions_are_swapped_is_caught():
    """The planted fault: the comparison above must see which attention comes first."""
    torch.manual_seed(0)
    layer = QueryLayer(SMALL).eval()
    randomise_(layer)
    peer = torch_layer(layer)
    layer.self_attention, layer.cross_attention = layer.cross_attention, layer.self_attention
    queries, memory = torch.randn(2, 3, 16), torch.randn(2, 18, 16)
    assert (layer(queries, memory) - peer(queries, memory)).abs().max() > 0.01


def test_the_head_is_its_parts_in_order(head):
    randomise_(head)
    given = tokens()
    memory = torch.cat(
        [head.project(head.norm(given[name])) + head.origin[name] for name in GAZES], dim=1
    )
    answers = head.queries.repeat(2, 1, 1)
    for layer in head.layers:
        answers = torch_layer(layer)(answers, memory)
    answers = head.final_norm(answers)
    wanted = torch.stack([head.outputs[t](answers[:, t]) for t in range(3)], dim=1)
    found = head(given)
    assert found.shape == (2, 1, 3, 8)
    torch.testing.assert_close(found[:, 0], wanted, atol=1e-5, rtol=1e-5)


def test_which_gaze_a_token_is_from_matters(head):
    randomise_(head)
    given = tokens()
    swapped = given | {"up": given["down"], "down": given["up"]}
    assert (head(given) - head(swapped)).abs().max() > 1e-3
    # The place in the image is what a token tells itself: there is no position here.
    turned = {name: value.flip(1) for name, value in given.items()}
    torch.testing.assert_close(head(given), head(turned), atol=1e-5, rtol=1e-5)


def test_every_parameter_learns(head):
    head.train()(tokens()).square().sum().backward()
    idle = [n for n, p in head.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    # A bias of the keys adds the same to every score, which no softmax sees.
    assert all(name.endswith("attention.k.bias") for name in idle), idle


def test_outputs_can_be_compared_and_started(head):
    (weights,) = head.output_weights()
    assert weights.shape == (3, 8, 16)
    assert torch.equal(weights[1], head.outputs[1].weight)
    assert 0 < task_orthogonality([weights]).item() < 1
    bias = torch.arange(24.0).reshape(3, 8)
    head.set_output_bias_(bias)
    assert torch.equal(torch.stack([layer.bias for layer in head.outputs]), bias)


def test_it_exports_in_four_dimensions(head):
    given = tokens(1)
    program = torch.export.export(head, (given,)).run_decompositions({})
    for node in program.graph.nodes:
        assert len(getattr(node.meta.get("val"), "shape", ())) <= 4
    torch.testing.assert_close(program.module()(given), head(given), atol=1e-6, rtol=1e-5)


def test_what_cannot_be_built_or_read_is_refused(head):
    with pytest.raises(UsageError, match="width 250, 2 layers, 4 heads"):
        QueryConfig(dim=250)
    with pytest.raises(UsageError, match="not 0 and 3"):
        QueryHead((), 10, 3, 8, SMALL)
    with pytest.raises(ShapeError, match="no tokens of 'down'"):
        head({name: value for name, value in tokens().items() if name != "down"})
