"""Training recipes of classification by name: what they set apart from ``TrainConfig``'s defaults.

``transfer`` and ``finetune`` are those of the article (METHODS D): a bare linear layer on CLS, SGD
for 20 epochs in batches of 32, the weights of the lowest validation loss. Momentum, which the
article does not state, is 0.9. Pictures are not squashed to 256×256 before they are cut, as the
article has it: an app that reads whole pictures would have to do the same.
"""

from collections.abc import Mapping
from typing import Any

from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig

_SHARED: Mapping[str, Any] = {
    "head": HeadConfig(kind="probe"),
    "features": FeatureConfig(kind="cls"),
    "optimizer": "sgd",
    "batch_size": 32,
    "epochs": 20,
    "patience": 20,
    "augment": True,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "transfer": {**_SHARED, "mode": "frozen", "lr": 5e-4, "schedule": "step"},
    "finetune": {
        **_SHARED,
        "mode": "finetune",
        "lr": 1e-4,
        "backbone_lr": 1e-4,
        "layer_decay": 1.0,
        "schedule": "constant",
    },
}
"""{name: {field of TrainConfig: value}}."""
