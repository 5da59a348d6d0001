"""MIL operations that work element by element, and reductions.

Formulas are those of the MIL operation reference; where it is silent (epsilon of ``log``,
``rsqrt`` and ``inverse``) the value inference in coremltools decides.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoexport.targets.coreml.mil_operands import CARRIER, Kernel, Operands


def _unary(function: Callable[[Tensor], Tensor]) -> Kernel:
    return lambda op: function(op.tensor())


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    return lambda op: function(op.tensor("x"), op.tensor("y"))


def _divide(x: Tensor, y: Tensor) -> Tensor:
    # Whole numbers divide in double, which holds every int32 exactly.
    return x / y if x.is_floating_point() or y.is_floating_point() else x.double() / y.double()


def gelu(op: Operands) -> Tensor:
    """The three modes are three functions; EXACT is the one with erf."""
    x, mode = op.tensor(), op.const("mode", "EXACT")
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x)


def clip(op: Operands) -> Tensor:
    """min(max(x, alpha), beta)."""
    return op.tensor().clamp(op.const("alpha"), op.const("beta"))


def cast(op: Operands) -> Tensor:
    """To whole numbers it truncates; the evaluator rounds a cast to half precision."""
    return op.tensor().to(CARRIER[op.dtype()])


def log(op: Operands) -> Tensor:
    """log(x + epsilon)."""
    return torch.log(op.tensor() + op.const("epsilon"))


def rsqrt(op: Operands) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return 1 / torch.sqrt(op.tensor() + op.const("epsilon"))


def inverse(op: Operands) -> Tensor:
    """1 / (x + epsilon)."""
    return 1 / (op.tensor() + op.const("epsilon"))


def leaky_relu(op: Operands) -> Tensor:
    """x where positive, else alpha·x."""
    return F.leaky_relu(op.tensor(), op.const("alpha"))


def elu(op: Operands) -> Tensor:
    """x where positive, else alpha·(exp x − 1)."""
    return F.elu(op.tensor(), op.const("alpha"))


def prelu(op: Operands) -> Tensor:
    """x where positive, else its channel's (axis 1) alpha times x."""
    return F.prelu(op.tensor(), op.tensor("alpha"))


def linear_activation(op: Operands) -> Tensor:
    """alpha·x + beta."""
    return op.tensor() * op.const("alpha") + op.const("beta")


def sigmoid_hard(op: Operands) -> Tensor:
    """alpha·x + beta, clipped to 0..1."""
    return linear_activation(op).clamp(0, 1)


def threshold(op: Operands) -> Tensor:
    """max(x, alpha)."""
    return op.tensor().clamp(min=op.const("alpha"))


def select(op: Operands) -> Tensor:
    """a where cond holds, else b."""
    return torch.where(op.tensor("cond").bool(), op.tensor("a"), op.tensor("b"))


def softmax(op: Operands) -> Tensor:
    """Along one axis."""
    return torch.softmax(op.tensor(), op.const("axis", -1))


def cumsum(op: Operands) -> Tensor:
    """Along one axis; ``reverse`` starts at its end, ``exclusive`` leaves the own element out."""
    x, axis = op.tensor(), op.const("axis", 0)
    source = x.flip(axis) if op.const("reverse", False) else x
    total = source.cumsum(axis)
    if op.const("exclusive", False):
        total = total - source
    return total.flip(axis) if op.const("reverse", False) else total


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Kernel:
    def kernel(op: Operands) -> Tensor:
        x, axes = op.tensor(), op.ints("axes")
        return function(x, list(range(x.ndim)) if axes is None else axes, op.const("keep_dims"))

    return kernel


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return (x if x.is_floating_point() else x.double()).mean(axes, keepdim=keep)


def _arg(function: Callable[..., Tensor]) -> Kernel:
    return lambda op: function(
        op.tensor(), dim=op.const("axis", -1), keepdim=op.const("keep_dims", False)
    )


ELEMENTWISE: dict[str, Kernel] = {
    "abs": _unary(torch.abs),
    "add": _binary(torch.add),
    "cast": cast,
    "ceil": _unary(torch.ceil),
    "clip": clip,
    "cos": _unary(torch.cos),
    "cumsum": cumsum,
    "elu": elu,
    "equal": _binary(torch.eq),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor),
    "floor_div": _binary(torch.floor_divide),
    "gelu": gelu,
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "identity": _unary(lambda x: x),
    "inverse": inverse,
    "leaky_relu": leaky_relu,
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "linear_activation": linear_activation,
    "log": log,
    "logical_and": _binary(torch.logical_and),
    "logical_not": _unary(torch.logical_not),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mod": _binary(torch.remainder),
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pow": _binary(torch.pow),
    "prelu": prelu,
    "real_div": _binary(_divide),
    "reduce_argmax": _arg(torch.argmax),
    "reduce_argmin": _arg(torch.argmin),
    "reduce_l1_norm": _reduce(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_l2_norm": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "reduce_log_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "reduce_log_sum_exp": _reduce(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "reduce_max": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_mean": _reduce(_mean),
    "reduce_min": _reduce(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_prod": _reduce(_product),
    "reduce_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_sum_square": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "relu": _unary(torch.relu),
    "relu6": _unary(F.relu6),
    "round": _unary(torch.round),
    "rsqrt": rsqrt,
    "select": select,
    "sigmoid": _unary(torch.sigmoid),
    "sigmoid_hard": sigmoid_hard,
    "sign": _unary(torch.sign),
    "silu": _unary(F.silu),
    "sin": _unary(torch.sin),
    "softmax": softmax,
    "softplus": _unary(F.softplus),
    "softsign": _unary(F.softsign),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "sub": _binary(torch.sub),
    "tanh": _unary(torch.tanh),
    "threshold": threshold,
}
