"""The passes in their order, and the deploy model that they make of a trained one."""

from collections.abc import Sequence

from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.bake_position import BakePosition
from dinoexport.passes.base import Pass, apply_passes
from dinoexport.passes.cut_last_block import CutLastBlock
from dinoexport.passes.cut_unread import CutUnread
from dinoexport.passes.fold_attention_scale import FoldAttentionScale
from dinoexport.passes.fold_batch_norms import FoldBatchNorms
from dinoexport.passes.fold_head import FoldHead
from dinoexport.passes.fold_layer_norms import FoldLayerNorms
from dinoexport.passes.fold_layer_scale import FoldLayerScale
from dinoexport.passes.fold_normalisation import FoldNormalisation
from dinoexport.passes.split_qkv import SplitQkv
from dinoexport.passes.to_channels_first import ToChannelsFirst
from dinoexport.passes.write_out_attention import WriteOutAttention
from dinotrain.model import TaskModel

PASSES: tuple[Pass, ...] = (
    CutUnread(),
    FoldBatchNorms(),
    FoldNormalisation(),
    BakePosition(),
    SplitQkv(),
    FoldLayerNorms(),
    FoldLayerScale(),
    WriteOutAttention(),
    FoldAttentionScale(),
    CutLastBlock(),
    FoldHead(),
)

LAYOUTS: dict[str, tuple[Pass, ...]] = {"tokens": (), "ane": (ToChannelsFirst(),), "cpu": ()}
"""Layout → what comes behind ``PASSES``: rows of tokens stay, or become the columns that Apple's
Neural Engine works in; for a CPU a target may choose operators that other processors lack."""


def build_deploy_model(
    model: TaskModel, passes: Sequence[Pass] = PASSES, debug: bool = False
) -> DeployModel:
    """Copy a trained model and bring the copy to the form that is captured.

    Args:
        model: eval mode; never changed.
        passes: in order.
        debug: also return every tap.

    Raises:
        PassError: see ``apply_passes``.
    """
    return apply_passes(DeployModel(model, debug), passes)
