"""The two sides hold one model: a checkpoint made of the peer's gives the peer's probabilities."""

import numpy as np
import pytest
import torch

from dinobench.peers.candidates import PEER_TFLITE
from dinobench.peers.runners import prepare
from dinobench.peers.weights import make_peer_model, write_checkpoint
from dinotrain.checkpoint import load_checkpoint

TINY = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56}


@pytest.mark.parametrize("hot", [False, True], ids=["plain", "hot"])
def test_checkpoint_and_peer_agree(hot, tmp_path) -> None:
    # Not the size that positions are made for, so that their resampling is compared too.
    peer = make_peer_model(42, hot, TINY)
    model, _ = load_checkpoint(write_checkpoint(peer, 42, tmp_path / "m.safetensors"))
    image = np.random.default_rng(0).integers(0, 256, (42, 42, 3), np.uint8)
    with torch.no_grad():
        theirs = peer(torch.from_numpy(prepare(image, PEER_TFLITE)))
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        ours = model({"image": pixels})["probabilities"]
    # Two orders of summing in float32.
    assert float((ours - theirs).abs().max()) < 1e-5
    assert 0.02 < float(theirs.max()) < 0.999


def test_hot_plants_outliers_in_the_residual_stream() -> None:
    def peak(hot: bool) -> float:
        model = make_peer_model(42, hot, TINY)
        image = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            x = model.backbone(image, output_hidden_states=True).hidden_states[-2]
        return float(x.abs().max() / x.abs().median())

    assert peak(True) > 2 * peak(False)
