"""Write a checkpoint of random weights, in a process of its own: benchmarks have no torch.

Cost does not depend on what the weights are, and no download is needed.
"""

import sys
from pathlib import Path
from typing import cast


def write(path: Path, variant: str = "dinov2_vits14", side: int = 224) -> Path:
    """Write the checkpoint: a published variant, an MLP head, every weight random.

    Args:
        path: of the file.
        variant: hub name.
        side: of the square image, in pixels.
    """
    import torch

    from dinotrain.backbones.vit import VARIANTS, VisionTransformer, init_weights_
    from dinotrain.checkpoint import CheckpointConfig, save_checkpoint
    from dinotrain.heads.branch import HeadConfig
    from dinotrain.model import TaskModel

    torch.manual_seed(0)
    config = CheckpointConfig(
        task="eyelid",
        backbone=VARIANTS[variant],
        image_size=(side, side),
        head=HeadConfig(kind="mlp"),
        trained_on="nothing (random weights)",
        notice="Random weights.",
    )
    model = TaskModel(config)
    init_weights_(cast(VisionTransformer, model.backbone))
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and scales start at 0 and 1, which a converter may fold away.
            parameter.add_(0.02 * torch.randn_like(parameter))
    return save_checkpoint(model, config, path)


if __name__ == "__main__":
    arguments = dict(zip(("variant", "side"), sys.argv[2:], strict=False))
    side = int(arguments.pop("side", 224))
    write(Path(sys.argv[1]), side=side, **arguments)
