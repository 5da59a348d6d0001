"""Makes the embedded checkpoint: a backbone on rendered eyes, frozen, then a head on its features.

``python -m dinotrain.pretrain.embedded --out FILE`` reproduces it, with the same eyes and the same
recipe; the bits differ between machines, the metrics by their noise.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from safetensors import SafetensorError, safe_open

from dinotrain.checkpoint import load_checkpoint, save_checkpoint
from dinotrain.data.synthetic.eyes import write_dataset
from dinotrain.encoding import Encoding
from dinotrain.errors import CheckpointError
from dinotrain.fit import train
from dinotrain.heads.branch import HeadConfig
from dinotrain.pretrain.dense import main as train_backbone
from dinotrain.train_config import TrainConfig

WORK = Path(tempfile.gettempdir()) / "dinotrain-embedded"
STEPS = 5160
"""As many as the shipped backbone took in the 58 minutes that it was given."""

HEAD_EYES = 2500
HEAD_SEED = 2026
BACKBONE_NOTE = "rendered eyes of dinotrain.data.synthetic.eyes, dense supervision"


def main(
    out: Annotated[Path, typer.Option(help="Checkpoint to write, .safetensors.")],
    work: Annotated[
        Path, typer.Option(help="Rendered eyes and the backbone are kept here.")
    ] = WORK,
    backbone: Annotated[
        Path | None, typer.Option(help="A backbone that was trained before; skips its training.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of the backbone.")] = STEPS,
    eyes: Annotated[
        int, typer.Option(help="Eyes that the head is trained and judged on.")
    ] = HEAD_EYES,
) -> None:
    """Train backbone and head, and write one checkpoint in half precision."""
    weights = backbone or work / "backbone.safetensors"
    if not weights.is_file():
        train_backbone(out=weights, steps=steps)
    # Subjects of another seed than the backbone's, so that the head's test split is new to both.
    manifest = write_dataset(eyes, HEAD_SEED, work / f"eyes-{eyes}")
    config = TrainConfig(
        data=manifest,
        backbone=str(weights),
        out=out,
        name=out.stem,
        head=HeadConfig(kind="mlp"),
        encoding=Encoding(kind="gray", bits=8),
        epochs=120,
        patience=30,
        seed=1,
        weights="float16",
        cache=work / "features",
        backbone_note=BACKBONE_NOTE,
    )
    train(config)
    keep_backbone_log(out, weights)


def keep_backbone_log(checkpoint: Path, backbone: Path) -> Path:
    """Add how the backbone was trained to the header of a checkpoint in half precision.

    Args:
        checkpoint: its header is extended, its weights stay.
        backbone: weights file as ``dinotrain.pretrain.dense`` writes it.

    Raises:
        CheckpointError: either of them is not what it should be.
    """
    try:
        with safe_open(backbone, framework="pt") as file:
            log = msgspec.json.decode((file.metadata() or {})["training"], type=dict[str, Any])
    except (SafetensorError, OSError, KeyError, msgspec.MsgspecError) as error:
        raise CheckpointError(
            f"{backbone}: no log of its training in the header ({error}). "
            "Make it with `python -m dinotrain.pretrain.dense`."
        ) from error
    model, config = load_checkpoint(checkpoint)
    extended = msgspec.structs.replace(config, training=config.training | {"backbone": log})
    return save_checkpoint(model, extended, checkpoint, torch.float16)


if __name__ == "__main__":
    typer.run(main)
