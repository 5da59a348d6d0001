"""Where values of one TFLite file stand in another: both are run, and compared bit by bit.

For graphs that the converter writes in other operators once taps are outputs, which digests of
operators cannot match. It takes LiteRT's own kernels and keeps every tensor.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

SEED = 0


def locate_values(
    shipped: bytes, debug: bytes, outputs: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, bool]]:
    """Find outputs of one file among the tensors of another, on random images.

    Args:
        shipped: the file to look through.
        debug: the file that has the outputs; of the same weights.
        outputs: their names in its signature.
        shapes: {input: (1, H, W, 3)} of both.

    Returns:
        {output: (tensor, whether it is the channels-last form of a map)}, the first tensor in
        running order; without outputs that are nowhere.
    """
    rng = np.random.default_rng(SEED)
    images = {name: rng.integers(0, 256, shape, np.uint8) for name, shape in shapes.items()}
    found: dict[bytes, int] = {}
    interpreter, _ = _run(shipped, images)
    for operator in interpreter._get_ops_details():
        for index in map(int, operator["outputs"]):
            found.setdefault(_bits(interpreter.get_tensor(index)), index)
    _, values = _run(debug, images)
    places = {}
    for name in outputs:
        value = values[name]
        index = found.get(_bits(value))
        turned = None
        if index is None and value.ndim == 4:
            turned = found.get(_bits(value.transpose(0, 2, 3, 1)))
        if index is not None:
            places[name] = (index, False)
        elif turned is not None:
            places[name] = (turned, True)
    return places


def _run(
    content: bytes, images: Mapping[str, np.ndarray]
) -> tuple[Interpreter, dict[str, np.ndarray]]:
    interpreter = Interpreter(
        model_content=content,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    values = interpreter.get_signature_runner()(**images)
    return interpreter, {name: np.array(value) for name, value in values.items()}


def _bits(value: np.ndarray) -> bytes:
    """Digest of a tensor's values in their order, whatever its shape."""
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).digest()
