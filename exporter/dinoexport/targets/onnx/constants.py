"""Large constants that half precision holds exactly are stored in it, in a graph of float32."""

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from dinoexport.targets.onnx.draft import Draft, replace_nodes_

LEAST_SIZE = 256
"""Numbers from which on the bytes saved are more than those of a cast."""


def store_constants_in_half_(model: ModelProto) -> None:
    """Store such initializers in float16 behind a Cast, which a runtime folds while it loads."""
    draft, constants = Draft(), []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor) if tensor.data_type == TensorProto.FLOAT else None
        if array is None or array.size < LEAST_SIZE:
            constants.append(tensor)
            continue
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), array):
            constants.append(tensor)
            continue
        source = draft.constant(f"{tensor.name}_half", half)
        draft.cast(source, TensorProto.FLOAT, tensor.name)
    kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in constants]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *draft.constants])
    replace_nodes_(model, [*draft.nodes, *model.graph.node])
