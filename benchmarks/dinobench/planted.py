"""A classifier of digits whose backbone has outlier channels where DINOv2-B has them: in its middle
blocks a few channels of the residual stream, and a few hidden units of MLPs, reach about 100 times
as far as the others.

The backbone is random and the linear head is fitted on its features, outliers and all, so the
trained model reads digits well, and no download is needed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from dinotrain.backbones.vit import ViTConfig
    from dinotrain.model import TaskModel

REACH = 300.0
"""Standard deviations; the other channels' peaks are at about three."""
CHANNELS = 4
"""Of the residual stream, and as many units of each MLP."""
RARE = 0.02
"""Share of tokens on which such a unit fires at all."""
READ_LESS = 10.0
"""How much less than others an outlier weighs where it is read."""
_RIDGE = 1e-1
"""Strength of the fit's penalty, per sample: the head must not live on the last digits."""


@dataclass(frozen=True)
class Digits:
    """Pictures, (n, side, side, 3) uint8, and the digits that they show, (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def read_digits(side: int, train: int, test: int) -> tuple[Digits, Digits]:
    """Return scikit-learn's digits: the first ones to train on, and the last ones."""
    from sklearn.datasets import load_digits

    from dinotrain.data.digits import upscale

    found = cast(Any, load_digits())
    chosen = [slice(0, train), slice(len(found.target) - test, None)]
    images = [np.stack([upscale(cells, side) for cells in found.images[part]]) for part in chosen]
    labels = [found.target[part].astype(np.int64) for part in chosen]
    return Digits(images[0], labels[0]), Digits(images[1], labels[1])


def planted_model(config: "ViTConfig", train: Digits, seed: int = 0) -> "TaskModel":
    """Make the model: random weights, outliers in the middle third of its blocks, a fitted head.

    Args:
        config: of the backbone; the whole thing has as many channels and blocks.
        train: to fit the head on.
        seed: of the weights.
    """
    import torch

    from dinotrain.backbones.vit import init_weights_
    from dinotrain.heads.branch import HeadConfig
    from dinotrain.heads.pool import FeatureConfig
    from dinotrain.model import ModelConfig, TaskModel

    torch.manual_seed(seed)
    side = train.images.shape[1]
    model = TaskModel(
        ModelConfig(
            task="classify",
            backbone=config,
            image_size=(side, side),
            features=FeatureConfig(kind="cls_quarters"),
            head=HeadConfig(kind="probe"),
            classes=tuple(map(str, range(10))),
        )
    )
    init_weights_(cast(Any, model.backbone))
    spread_weights_(model)
    model.eval().requires_grad_(False)
    third = config.depth // 3
    plant_outliers_(cast(Any, model.backbone), range(third, config.depth - third), train.images[:8])
    fit_head_(model, train)
    return model


def spread_weights_(model: "TaskModel") -> None:
    """Draw weights that keep the size of what they read, in place: pictures then stay apart."""
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.backbone.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
                module.bias.normal_(std=0.1)  # type: ignore[union-attr]


def plant_outliers_(backbone: Any, blocks: range, images: NDArray[np.uint8]) -> None:
    """Give the middle blocks of a ViT outlier channels, in place; its function stays sane.

    A few channels of the residual stream are shifted far beyond its spread before the first of
    these blocks and back behind the last. Each LayerNorm between weighs them down and the others up
    again, so what reads it hardly notices. A few units of each MLP fire on few tokens, and as
    far.

    Args:
        backbone: a VisionTransformer, in eval mode.
        blocks: those in the middle, not the first one.
        images: (n, side, side, 3) uint8, that the spread is measured on.
    """
    import torch

    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.225
    first, width = blocks[0], backbone.config.embed_dim
    before, last = backbone.blocks[first - 1], backbone.blocks[blocks[-1]]
    channels = torch.arange(CHANNELS) * (width // CHANNELS) + 3
    signs = torch.tensor([1.0, -1.0]).repeat(CHANNELS // 2)
    with torch.no_grad():
        stream = _trace(backbone, x, first - 1)
        shift = torch.zeros(width)
        shift[channels] = REACH * float(stream.std()) * signs
        before.mlp.fc2.bias.add_(shift / before.ls2.gamma)
        last.mlp.fc2.bias.sub_(shift / last.ls2.gamma)
        gain = (1 + CHANNELS * REACH**2 / width) ** 0.5
        for index in blocks:
            block = backbone.blocks[index]
            for norm in (block.norm1, block.norm2):
                norm.weight.mul_(gain)
                norm.weight[channels] /= READ_LESS
            read = block.norm2(block.attend(_trace(backbone, x, index - 1)))
            units = torch.arange(CHANNELS) * 5 + index
            fc1, fc2 = block.mlp.fc1, block.mlp.fc2
            usual = fc1(read).reshape(-1, fc1.out_features)[:, units].quantile(1 - RARE, dim=0)
            fc1.bias[units] -= usual
            fc1.weight[units] *= REACH
            fc1.bias[units] *= REACH
            fc2.weight[:, units] /= READ_LESS


def _trace(backbone: Any, x: "torch.Tensor", block: int) -> "torch.Tensor":
    """(n, 3, H, W) → the residual stream behind a block, (n, T, D)."""
    return dict(backbone.trace(x, block))[f"blocks.{block}.mlp"]


def fit_head_(model: "TaskModel", train: Digits) -> None:
    """Fit the linear head by ridge regression towards the classes, in place."""
    import torch

    features = extract(model, train.images).double()
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    x = (features - mean) / std
    wanted = torch.nn.functional.one_hot(torch.from_numpy(train.labels), 10).double() - 0.1
    penalty = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ wanted) / std[:, None]
    layer = cast(Any, model.head).members[0]["classes"][-1]
    with torch.no_grad():
        # Ten times as steep, so that the softmax of a digit that is clear is near 1.
        layer.weight.copy_(10 * weight.T)
        layer.bias.copy_(-10 * (mean @ weight))


def extract(model: "TaskModel", images: NDArray[np.uint8], batch: int = 32) -> "torch.Tensor":
    """Return what the head reads of pictures: (n, features)."""
    import torch

    parts = []
    with torch.no_grad():
        for start in range(0, len(images), batch):
            pixels = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2).float()
            parts.append(model.pool(model.extract(pixels)))
    return torch.cat(parts)


def classify(deploy: Any, images: NDArray[np.uint8], batch: int = 32) -> NDArray[np.int64]:
    """Return the digits that a deploy model reads, (n,); several pictures at once, which it does
    for tasks of several pictures too.
    """
    import torch

    found = []
    with torch.no_grad():
        for start in range(0, len(images), batch):
            pixels = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2).float()
            pooled = deploy.pool(deploy.pool.extract(deploy.backbone, pixels))
            found.append(deploy.head({"image": pooled}).reshape(len(pixels), -1).argmax(dim=1))
    return torch.cat(found).numpy()
