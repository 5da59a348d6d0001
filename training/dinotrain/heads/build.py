"""Which head reads which features, and the heads that give logits per target.

Tasks build their heads here, so that a new kind of head is for all of them.
"""

from collections.abc import Sequence
from typing import get_args

from dinotrain.backbones.loading import BackboneConfig
from dinotrain.backbones.vit import ViTConfig
from dinotrain.errors import UsageError
from dinotrain.heads.branch import BranchHead, BranchSpec, HeadConfig, HeadKind, Join
from dinotrain.heads.pool import FeatureConfig, FeatureKind
from dinotrain.heads.query import QueryHead

_NO_VECTOR: dict[HeadKind, FeatureKind] = {"query": "tokens", "multiscale": "maps"}


def accepted_features(head: HeadKind) -> tuple[FeatureKind, ...]:
    """Return the kinds of features that a head can read."""
    if head in _NO_VECTOR:
        return (_NO_VECTOR[head],)
    return tuple(k for k in get_args(FeatureKind) if k not in _NO_VECTOR.values())


def choose_features(
    head: HeadKind, wanted: FeatureConfig | None, backbone: BackboneConfig
) -> FeatureConfig:
    """Return the features that are asked for, or what suits a head and a backbone where none are.

    Raises:
        UsageError: the head cannot read them.
    """
    accepted = accepted_features(head)
    if wanted is None:
        vector: FeatureKind = "cls_mean" if isinstance(backbone, ViTConfig) else "pooled"
        # The brief of the segmentation decoder reads its taps as they are (METHODS C).
        norm = "none" if head == "multiscale" else "final"
        return FeatureConfig(kind=_NO_VECTOR.get(head, vector), tap_norm=norm)
    if wanted.kind not in accepted:
        raise UsageError(
            f"head {head} cannot read {wanted.kind} features; accepted: {', '.join(accepted)}"
        )
    return wanted


def build_target_head(
    config: HeadConfig,
    *,
    inputs: Sequence[str],
    in_width: int,
    branches: list[BranchSpec],
    width: int,
    join: Join,
) -> BranchHead | QueryHead:
    """Return a head that gives (B, members, targets, width).

    Args:
        config: its kind and size.
        inputs: names of the images.
        in_width: of a pooled vector, or of a token.
        branches: of a head over vectors; the query decoder looks at all inputs for every target.
        width: logits per target.
        join: of a head over vectors.
    """
    if config.kind == "query":
        targets = sum(branch.targets for branch in branches)
        return QueryHead(inputs, in_width, targets, width, config.query)
    return BranchHead(branches, width, config, join)
