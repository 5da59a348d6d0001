"""Half precision for TFLite: weights of linear layers and convolutions are stored in float16."""

import tempfile
from pathlib import Path

from ai_edge_quantizer import algorithm_manager, qtyping, quantizer

_OPERATIONS = (
    qtyping.TFLOperationName.FULLY_CONNECTED,
    qtyping.TFLOperationName.CONV_2D,
    qtyping.TFLOperationName.CONV_2D_TRANSPOSE,
)


def store_half_precision(content: bytes) -> bytes:
    """Return the same model with float16 weights behind DEQUANTIZE; arithmetic stays float32."""
    with tempfile.TemporaryDirectory(prefix="dinoexport-") as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(content)
        tool = quantizer.Quantizer(str(path))
        for operation in _OPERATIONS:
            tool.add_weight_only_config(
                regex=".*",
                operation_name=operation,
                num_bits=16,
                granularity=qtyping.QuantGranularity.TENSORWISE,
                algorithm_key=algorithm_manager.AlgorithmName.FLOAT_CASTING,
            )
        return bytes(tool.quantize().quantized_model or b"")
