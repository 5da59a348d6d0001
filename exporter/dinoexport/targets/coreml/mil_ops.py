"""The table of MIL operations that the evaluator knows: name → function of its operands."""

from dinoexport.targets.coreml.mil_constants import CONSTANTS, EXACT
from dinoexport.targets.coreml.mil_elementwise import ELEMENTWISE
from dinoexport.targets.coreml.mil_layers import LAYERS
from dinoexport.targets.coreml.mil_operands import Kernel
from dinoexport.targets.coreml.mil_shapes import SHAPES

KERNELS: dict[str, Kernel] = {**CONSTANTS, **ELEMENTWISE, **LAYERS, **SHAPES}
"""Every operation but ``const``, which is read from the file."""

__all__ = ["EXACT", "KERNELS"]
