"""Training recipes of segmentation by name: what they set apart from ``TrainConfig``'s defaults.

``brief`` is the source's own configuration file. It trains the backbone, as its file says and its
text does not; its warm-up of 20 epochs comes before restarts that know of none; and its patience of
5 may stop it before the first restart. ``frozen`` is ours: the backbone's features are computed
once, and the decoder learns a hundred times faster. Source: METHODS C, Train and Contradictions.
"""

from collections.abc import Mapping
from typing import Any

_SHARED: Mapping[str, Any] = {
    "image_size": (518, 518),
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "batch_size": 8,
    "epochs": 200,
    "schedule": "sgdr",
    "restart_epochs": 66,
    "restart_mult": 2,
    "min_lr": 1e-6,
    "clip_norm": 1.0,
    "accumulate": 1,
    "min_delta": 0.001,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "brief": {
        **_SHARED,
        "mode": "finetune",
        "lr": 1e-5,
        "backbone_lr": 1e-5,
        "layer_decay": 1.0,
        "warmup_epochs": 20,
        "patience": 5,
        # The source says AMP; this kind needs no scaling of the loss, and runs on a CPU too.
        "amp": "bfloat16",
        "augment": True,
    },
    "frozen": {**_SHARED, "mode": "frozen", "lr": 1e-3, "patience": 20},
}
"""{name: {field of TrainConfig: value}}."""
