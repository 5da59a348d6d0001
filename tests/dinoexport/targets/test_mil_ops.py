"""Each MIL operation against Apple's NumPy value inference, else against a slow plain formula."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

logging.getLogger("coremltools").setLevel(logging.ERROR)

import coremltools as ct  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402, N813
from coremltools.converters.mil.mil import Function, types  # noqa: E402

from dinoexport.targets.coreml.evaluator import PackageEvaluator  # noqa: E402
from dinoexport.targets.coreml.mil_ops import KERNELS  # noqa: E402

RNG = np.random.default_rng(7)


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return RNG.uniform(0.1, 3, shape).astype(np.float32)


def whole(*shape: int, low: int = -9, high: int = 9) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.int32)


def evaluate(
    build: Callable, arrays: list[np.ndarray], folder: Path, target=ct.target.iOS17
) -> list[np.ndarray]:
    """Build a program over inputs, save it, and evaluate the saved package."""
    specs = [
        mb.TensorSpec(array.shape, types.int32 if array.dtype == np.int32 else types.fp32)
        for array in arrays
    ]
    names = [f"in{index}" for index in range(len(arrays))]

    def body(*inputs):
        found = build(*inputs)
        parts = list(found) if isinstance(found, list | tuple) else [found]
        # Bools and bytes cannot leave a Core ML model.
        small = (types.bool, types.int8, types.uint8, types.int16, types.uint16)
        parts = [mb.cast(x=v, dtype="int32") if v.dtype in small else v for v in parts]
        return tuple(mb.identity(x=part, name=f"out{i}") for i, part in enumerate(parts))

    code = f"lambda {', '.join(names)}: body({', '.join(names)})"
    program = mb.program(input_specs=specs, opset_version=target)(eval(code, {"body": body}))
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = folder / "case.mlpackage"
    model.save(str(path))
    outputs = PackageEvaluator(path).run(dict(zip(names, arrays, strict=True)), True).outputs
    return [outputs[f"out{index}"] for index in range(len(outputs))]


def inferred(build: Callable, arrays: list[np.ndarray], target=ct.target.iOS17) -> list[np.ndarray]:
    """Apple's NumPy reference: the same operation over constants."""
    with Function({}, opset_version=target):
        found = build(*[mb.const(val=array) for array in arrays])
        parts = list(found) if isinstance(found, list | tuple) else [found]
        values = [
            part.val if part.val is not None else part.op.materialized_val_inference()
            for part in parts
        ]
    assert all(value is not None for value in values), "no reference: use a plain formula"
    return [np.asarray(value) for value in values]


X = normal(2, 3, 4)
Y = normal(2, 3, 4)
P = positive(2, 3, 4)
I = whole(2, 3, 4)  # noqa: E741
J = whole(2, 3, 4, low=1)
IMAGE = normal(2, 3, 5, 6)

ONE_INPUT = {
    "abs": X, "ceil": X * 5, "cos": X, "erf": X, "exp": X, "exp2": X, "floor": X * 5, "relu": X,
    "relu6": X * 8, "round": X * 5, "sigmoid": X, "sign": X, "sin": X, "softplus": X,
    "softsign": X, "sqrt": P, "square": X, "tanh": X, "log": P, "rsqrt": P, "inverse": P,
}  # fmt: skip
TWO_INPUTS = {
    "add": (X, Y), "sub": (X, Y), "mul": (X, Y[:1]), "real_div": (X, P), "floor_div": (X, P),
    "mod": (X, P), "maximum": (X, Y), "minimum": (X, Y), "pow": (P, Y), "equal": (I, J),
    "not_equal": (I, J), "greater": (X, Y), "greater_equal": (I, J), "less": (X, Y),
    "less_equal": (I, J),
}  # fmt: skip
REDUCTIONS = (
    "reduce_l1_norm", "reduce_l2_norm", "reduce_log_sum", "reduce_log_sum_exp", "reduce_max",
    "reduce_mean", "reduce_min", "reduce_prod", "reduce_sum", "reduce_sum_square",
)  # fmt: skip

INFERRED: dict[str, tuple[Callable, list[np.ndarray]]] = {
    **{n: (lambda x, n=n: getattr(mb, n)(x=x), [a]) for n, a in ONE_INPUT.items()},
    **{n: (lambda x, y, n=n: getattr(mb, n)(x=x, y=y), [*a]) for n, a in TWO_INPUTS.items()},
    **{
        f"{n}-{keep}": (
            lambda x, n=n, keep=keep: getattr(mb, n)(x=x, axes=[-1, 0], keep_dims=keep),
            [P],
        )
        for n, keep in itertools.product(REDUCTIONS, (True, False))
    },
    "reduce_sum-all": (lambda x: mb.reduce_sum(x=x), [X]),
    "reduce_mean-int": (lambda x: mb.reduce_mean(x=x, axes=[1]), [I]),
    "add-int": (lambda x, y: mb.add(x=x, y=y), [I, J]),
    "floor_div-int": (lambda x, y: mb.floor_div(x=x, y=y), [I, J]),
    "mod-int": (lambda x, y: mb.mod(x=x, y=y), [I, J]),
    "reduce_argmax": (lambda x: mb.reduce_argmax(x=x, axis=1), [X]),
    "reduce_argmax-keep": (lambda x: mb.reduce_argmax(x=x, axis=-1, keep_dims=True), [X]),
    "reduce_argmin": (lambda x: mb.reduce_argmin(x=x, axis=0), [X]),
    "gelu-exact": (lambda x: mb.gelu(x=x, mode="EXACT"), [X * 2]),
    "gelu-tanh": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), [X * 2]),
    "gelu-sigmoid": (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), [X * 2]),
    "softmax": (lambda x: mb.softmax(x=x, axis=1), [X]),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.7), [X]),
    "threshold": (lambda x: mb.threshold(x=x, alpha=0.2), [X]),
    "leaky_relu": (lambda x: mb.leaky_relu(x=x, alpha=0.1), [X]),
    "elu": (lambda x: mb.elu(x=x, alpha=0.7), [X]),
    "prelu": (lambda x: mb.prelu(x=x, alpha=np.float32([0.1, 0.2, 0.3])), [IMAGE]),
    "linear_activation": (lambda x: mb.linear_activation(x=x, alpha=2.0, beta=0.3), [X]),
    "sigmoid_hard": (lambda x: mb.sigmoid_hard(x=x, alpha=0.2, beta=0.5), [X * 4]),
    "cast-int": (lambda x: mb.cast(x=x, dtype="int32"), [X * 7]),
    "cast-bool": (lambda x: mb.cast(x=x, dtype="bool"), [I]),
    "cast-float": (lambda x: mb.cast(x=x, dtype="fp32"), [I]),
    "logical": (
        lambda x, y: mb.logical_xor(
            x=mb.logical_and(x=mb.greater(x=x, y=0.0), y=mb.greater(x=y, y=0.0)),
            y=mb.logical_or(x=mb.less(x=x, y=-1.0), y=mb.logical_not(x=mb.less(x=y, y=0.5))),
        ),
        [X, Y],
    ),
    "select": (lambda x, y: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=y), [X, Y]),
    "identity": (lambda x: mb.identity(x=x), [X]),
    "cumsum": (lambda x: mb.cumsum(x=x, axis=1), [X]),
    "cumsum-reverse": (lambda x: mb.cumsum(x=x, axis=2, reverse=True), [X]),
    "reshape": (lambda x: mb.reshape(x=x, shape=[0, -1]), [X[0]]),
    "transpose": (lambda x: mb.transpose(x=x, perm=[0, -1, -2]), [X]),
    "expand_dims": (lambda x: mb.expand_dims(x=x, axes=[0, -1]), [X]),
    "squeeze": (lambda x: mb.squeeze(x=x, axes=[0, 2]), [normal(1, 3, 1)]),
    "squeeze-all": (lambda x: mb.squeeze(x=x), [normal(1, 3, 1)]),
    "concat": (lambda x, y: mb.concat(values=[x, y], axis=-2), [X, normal(2, 5, 4)]),
    "stack": (lambda x, y: mb.stack(values=[x, y], axis=1), [X, Y]),
    "split": (lambda x: mb.split(x=x, split_sizes=[1, 3], axis=-1), [X]),
    "split-even": (lambda x: mb.split(x=x, num_splits=3, axis=1), [X]),
    "slice_by_index": (
        lambda x: mb.slice_by_index(
            x=x, begin=[0, 1, -3], end=[0, 0, -1], end_mask=[True, True, False]
        ),
        [X],
    ),
    "slice_by_index-squeeze": (
        lambda x: mb.slice_by_index(
            x=x,
            begin=[0, 1, 0],
            end=[0, 2, 0],
            begin_mask=[True, False, True],
            end_mask=[True, False, True],
            squeeze_mask=[False, True, False],
        ),
        [X],
    ),
    "slice_by_index-stride": (
        lambda x: mb.slice_by_index(
            x=x, begin=[1, 0, 3], end=[0, 3, 0], stride=[-1, 2, -1], end_mask=[True, False, False]
        ),
        [X],
    ),
    "slice_by_size": (lambda x: mb.slice_by_size(x=x, begin=[0, 1, 2], size=[2, -1, 1]), [X]),
    "pad": (lambda x: mb.pad(x=x, pad=[1, 0, 2, 3], constant_val=1.5), [X]),
    "pad-reflect": (lambda x: mb.pad(x=x, pad=[2, 1, 0, 3], mode="reflect"), [X]),
    "pad-replicate": (lambda x: mb.pad(x=x, pad=[2, 1, 0, 3], mode="replicate"), [X]),
    "tile": (lambda x: mb.tile(x=x, reps=[1, 2, 3]), [X]),
    "reverse": (lambda x: mb.reverse(x=x, axes=[0, 2]), [X]),
    "gather": (lambda x, i: mb.gather(x=x, indices=i, axis=1), [X, np.int32([[2, 0], [1, 1]])]),
    "gather-scalar": (lambda x: mb.gather(x=x, indices=np.int32(2), axis=-1), [X]),
    "gather-batch": (
        lambda x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
        [X, np.int32([[3, 0], [1, 2]])],
    ),
    "gather_along_axis": (
        lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
        [X, whole(2, 5, 4, low=0, high=3)],
    ),
    "fill": (lambda x: mb.add(x=x, y=mb.fill(shape=[2, 3, 4], value=0.5)), [X]),
    "range_1d": (lambda x: mb.add(x=x, y=mb.range_1d(start=0, end=12, step=3)), [I]),
    "shape": (lambda x: mb.shape(x=x), [X]),
    "topk": (lambda x: mb.topk(x=x, k=2, axis=1), [X]),
    "topk-ascending": (lambda x: mb.topk(x=x, k=2, axis=-1, ascending=True), [X]),
    "argsort": (lambda x: mb.argsort(x=x, axis=1), [X]),
    "linear": (
        lambda x: mb.linear(x=x, weight=normal_weight, bias=np.float32([1, 2])),
        [X],
    ),
    "matmul": (lambda x, y: mb.matmul(x=x, y=y), [X, normal(2, 4, 5)]),
    "matmul-transposed": (
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
        [X, normal(2, 5, 3)],
    ),
    "einsum": (
        lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
        [normal(2, 3, 4, 5), normal(2, 5, 4, 6)],
    ),
    "layer_norm": (
        lambda x: mb.layer_norm(
            x=x,
            axes=[-1],
            gamma=np.float32([1, 2, 3, 4]),
            beta=np.float32([4, 3, 2, 1]),
            epsilon=1e-6,
        ),
        [X],
    ),
    "layer_norm-inner": (
        lambda x: mb.layer_norm(
            x=x, axes=[1], gamma=np.float32([1, 2, 3]), beta=np.float32([3, 2, 1]), epsilon=1e-3
        ),
        [X],
    ),
    "l2_norm": (lambda x: mb.l2_norm(x=x, epsilon=1e-6), [IMAGE]),
    "quantize": (
        lambda x: mb.quantize(
            input=x,
            scale=np.float32([0.1, 0.02, 0.3]),
            zero_point=np.int8([3, -4, 0]),
            axis=1,
            output_dtype="int8",
        ),
        [X],
    ),
    "quantize-tensor": (
        lambda x: mb.quantize(input=x, scale=np.float32(0.02), output_dtype="uint8"),
        [X],
    ),
}
normal_weight = normal(2, 4)


def close(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for ours, reference in zip(found, wanted, strict=True):
        assert ours.shape == reference.shape
        if reference.dtype.kind == "f":
            # float32 in another order of sums: a few units in the last place of values near 10.
            np.testing.assert_allclose(ours, reference, rtol=3e-6, atol=3e-6)
        else:
            np.testing.assert_array_equal(ours, reference.astype(ours.dtype))


@pytest.fixture(scope="module")
def found_by_case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    """All cases in one program: a conversion each would take a minute."""
    counts: dict[str, int] = {}

    def build(*inputs):
        left, results = list(inputs), []
        for case, (part, arrays) in INFERRED.items():
            found = part(*[left.pop(0) for _ in arrays])
            results += (parts := list(found) if isinstance(found, list | tuple) else [found])
            counts[case] = len(parts)
        return results

    arrays = [array for _, arrays in INFERRED.values() for array in arrays]
    found = evaluate(build, arrays, tmp_path_factory.mktemp("inferred"))
    return {case: [found.pop(0) for _ in range(count)] for case, count in counts.items()}


@pytest.mark.parametrize("case", INFERRED)
def test_operation_agrees_with_value_inference(
    case: str, found_by_case: dict[str, list[np.ndarray]]
) -> None:
    build, arrays = INFERRED[case]
    close(found_by_case[case], inferred(build, arrays))


def test_attention_agrees_with_value_inference(tmp_path: Path) -> None:
    arrays = [normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 4), normal(5, 7)]

    def build(query, key, value, mask):
        call = mb.scaled_dot_product_attention
        kept = mb.greater(x=mask, y=-0.5)
        return (
            call(query=query, key=key, value=value),
            call(query=query, key=key, value=value, attn_mask=mask),
            call(query=query, key=key, value=value, attn_mask=kept),
        )

    target = ct.target.iOS18
    close(evaluate(build, arrays, tmp_path, target), inferred(build, arrays, target))


# Operations without value inference: slow formulas that share nothing with the kernels.


def plain_conv(x, weight, bias, strides, pads, dilations, groups):
    """Sum over every tap of the window, two spatial axes, one output element at a time."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads])
    out_channels, in_group, kh, kw = weight.shape
    height = (x.shape[2] - (kh - 1) * dilations[0] - 1) // strides[0] + 1
    width = (x.shape[3] - (kw - 1) * dilations[1] - 1) // strides[1] + 1
    out = np.zeros((x.shape[0], out_channels, height, width))
    for o, r, c in np.ndindex(out_channels, height, width):
        first = o // (out_channels // groups) * in_group
        rows = r * strides[0] + np.arange(kh) * dilations[0]
        cols = c * strides[1] + np.arange(kw) * dilations[1]
        window = x[:, first : first + in_group][:, :, rows][:, :, :, cols]
        out[:, o, r, c] = (window * weight[o]).sum((1, 2, 3)) + bias[o]
    return out.astype(np.float32)


CONV_PADS = {
    "valid": [(0, 0), (0, 0)],
    "custom": [(1, 0), (2, 1)],
    # side 5, stride 2, window 3: total 2; side 6, stride 1, dilated window 4: total 3
    "same": [(1, 1), (1, 2)],
    "same_lower": [(1, 1), (2, 1)],
}


@pytest.mark.parametrize("kind", CONV_PADS)
def test_conv(kind: str, tmp_path: Path) -> None:
    x, weight, bias = normal(2, 4, 5, 6), normal(6, 2, 3, 2), normal(6)
    extra = {"pad": [1, 0, 2, 1]} if kind == "custom" else {}

    def build(x):
        return mb.conv(
            x=x, weight=weight, bias=bias, strides=[2, 1], dilations=[1, 3], groups=2,
            pad_type=kind, **extra,
        )  # fmt: skip

    wanted = plain_conv(x, weight, bias, (2, 1), CONV_PADS[kind], (1, 3), 2)
    close(evaluate(build, [x], tmp_path), [wanted])


def plain_conv_transpose(x, weight, bias, strides, groups):
    """Scatter every input element through its window, without any padding."""
    in_group, out_group = x.shape[1] // groups, weight.shape[1]
    kh, kw = weight.shape[2:]
    height, width = (
        (n - 1) * s + k for n, s, k in zip(x.shape[2:], strides, (kh, kw), strict=True)
    )
    out = np.zeros((x.shape[0], out_group * groups, height, width))
    for i, r, c in np.ndindex(*x.shape[1:]):
        first = i // in_group * out_group
        top, left = r * strides[0], c * strides[1]
        spread = x[:, i, r, c][:, None, None, None].astype(np.float64) * weight[i]
        out[:, first : first + out_group, top : top + kh, left : left + kw] += spread
    return (out + bias[:, None, None]).astype(np.float32)


@pytest.mark.parametrize("kind", ["valid", "custom", "same", "output_shape"])
def test_conv_transpose(kind: str, tmp_path: Path) -> None:
    x, weight, bias = normal(2, 4, 3, 5), normal(4, 2, 3, 4), normal(4)
    full = plain_conv_transpose(x, weight, bias, (2, 3), 2)
    assert full.shape[2:] == (7, 16)
    extra = {
        "valid": {},
        "custom": {"pad": [1, 0, 2, 1]},
        "same": {},
        "output_shape": {"pad": [1, 1, 1, 1], "output_shape": [2, 4, 6, 15]},
    }[kind]

    def build(x):
        return mb.conv_transpose(
            x=x, weight=weight, bias=bias, strides=[2, 3], groups=2,
            pad_type="custom" if extra else kind, **extra,
        )  # fmt: skip

    wanted = {
        "valid": full,
        "custom": full[:, :, 1:, 2:-1],
        "same": full[:, :, :6, :15],
        "output_shape": full[:, :, 1:, 1:],
    }[kind]
    close(evaluate(build, [x], tmp_path), [wanted])


def plain_pool(x, kernel, strides, pads, combine):
    axes = zip(x.shape[2:], pads, kernel, strides, strict=True)
    sides = [(n + sum(p) - k) // s + 1 for n, p, k, s in axes]
    out = np.zeros((*x.shape[:2], *sides), np.float32)
    for r, c in np.ndindex(*sides):
        top, left = r * strides[0] - pads[0][0], c * strides[1] - pads[1][0]
        rows = [i for i in range(top, top + kernel[0]) if 0 <= i < x.shape[2]]
        cols = [i for i in range(left, left + kernel[1]) if 0 <= i < x.shape[3]]
        out[:, :, r, c] = combine(x[:, :, rows][:, :, :, cols])
    return out


POOLS = {"valid": [(0, 0), (0, 0)], "custom": [(1, 0), (1, 2)], "same": [(1, 1), (0, 1)]}


@pytest.mark.parametrize("kind", POOLS)
def test_pools(kind: str, tmp_path: Path) -> None:
    keywords = {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": kind}
    if kind == "custom":
        keywords["pad"] = [1, 0, 1, 2]

    def build(x):
        return (
            mb.max_pool(x=x, **keywords),
            mb.avg_pool(x=x, **keywords),
            mb.avg_pool(x=x, exclude_padding_from_average=True, **keywords),
        )

    rules = (
        lambda w: w.max((2, 3)),
        lambda w: w.sum((2, 3)) / 9,
        lambda w: w.mean((2, 3)),
    )
    wanted = [plain_pool(IMAGE, (3, 3), (2, 2), POOLS[kind], rule) for rule in rules]
    close(evaluate(build, [IMAGE], tmp_path), wanted)


def test_norms_over_channels(tmp_path: Path) -> None:
    gamma, beta, mean, variance = normal(3), normal(3), normal(3), positive(3)

    def build(x):
        return (
            mb.batch_norm(x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=1e-3),
            mb.instance_norm(x=x, gamma=gamma, beta=beta, epsilon=1e-3),
        )

    wanted = [np.empty_like(IMAGE), np.empty_like(IMAGE)]
    for n, c in np.ndindex(2, 3):
        plane = IMAGE[n, c].astype(np.float64)
        fixed = (plane - mean[c]) / np.sqrt(variance[c] + 1e-3)
        own = (plane - plane.mean()) / np.sqrt(plane.var() + 1e-3)
        wanted[0][n, c], wanted[1][n, c] = fixed * gamma[c] + beta[c], own * gamma[c] + beta[c]
    close(evaluate(build, [IMAGE], tmp_path), wanted)


def plain_bilinear(x, places):
    """Interpolate at fractional places per axis, element by element."""
    out = np.zeros((*x.shape[:2], len(places[0]), len(places[1])), np.float32)
    for (r, y), (c, z) in itertools.product(enumerate(places[0]), enumerate(places[1])):
        y, z = (min(max(v, 0), n - 1) for v, n in zip((y, z), x.shape[2:], strict=True))
        top, left = int(y), int(z)
        low, right = min(top + 1, x.shape[2] - 1), min(left + 1, x.shape[3] - 1)
        upper = x[:, :, top, left] * (1 - z + left) + x[:, :, top, right] * (z - left)
        lower = x[:, :, low, left] * (1 - z + left) + x[:, :, low, right] * (z - left)
        out[:, :, r, c] = upper * (1 - y + top) + lower * (y - top)
    return out


# Grid points by the notes of the operation reference; x is (.., 5, 6), the target 8×4.
SAMPLING = {
    "STRICT_ALIGN_CORNERS": lambda n, m, i: i * (n - 1) / (m - 1),
    "ALIGN_CORNERS": lambda n, m, i: i * (n - 1) / (m - 1),
    "DEFAULT": lambda n, m, i: i * (n - n / m) / (m - 1),
    "OFFSET_CORNERS": lambda n, m, i: 0.5 * (n - 1) / m + i * (n - 1) / m,
    "UNALIGN_CORNERS": lambda n, m, i: (i + 0.5) * n / m - 0.5,
}


@pytest.mark.parametrize("mode", SAMPLING)
def test_resize_bilinear(mode: str, tmp_path: Path) -> None:
    def build(x):
        return mb.resize_bilinear(
            x=x, target_size_height=8, target_size_width=4, sampling_mode=mode
        )

    places = [[SAMPLING[mode](n, m, i) for i in range(m)] for n, m in ((5, 8), (6, 4))]
    close(evaluate(build, [IMAGE], tmp_path), [plain_bilinear(IMAGE, places)])


def test_upsampling(tmp_path: Path) -> None:
    def build(x):
        return (
            mb.upsample_bilinear(
                x=x, scale_factor_height=2, scale_factor_width=3, align_corners=True
            ),
            mb.upsample_bilinear(
                x=x, scale_factor_height=2, scale_factor_width=3, align_corners=False
            ),
            mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        )

    sizes = ((5, 10), (6, 18))
    grids = [
        [[SAMPLING[mode](n, m, i) for i in range(m)] for n, m in sizes]
        for mode in ("STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS")
    ]
    wanted = [plain_bilinear(IMAGE, grid) for grid in grids]
    wanted.append(IMAGE.repeat(2, axis=2).repeat(3, axis=3))
    close(evaluate(build, [IMAGE], tmp_path), wanted)


def test_shuffles_and_the_rest(tmp_path: Path) -> None:
    x = normal(2, 8, 3, 5)

    def build(x):
        return (
            mb.silu(x=x),
            mb.pixel_shuffle(x=x, upscale_factor=2),
            mb.pixel_unshuffle(
                x=mb.pixel_shuffle(x=x, upscale_factor=2), downscale_factor=np.uint32(2)
            ),
            mb.concat(values=[x, mb.square(x=x)], axis=1, interleave=True),
            mb.cumsum(x=x, axis=1, exclusive=True),
            mb.fill_like(ref_tensor=x, value=2.5),
            mb.crop(x=x, crop_height=[1, 0], crop_width=[1, 2]),
        )

    shuffled = np.zeros((2, 2, 6, 10), np.float32)
    mixed = np.zeros((2, 16, 3, 5), np.float32)
    for c, r, k in np.ndindex(8, 3, 5):
        shuffled[:, c // 4, 2 * r + c % 4 // 2, 2 * k + c % 2] = x[:, c, r, k]
        mixed[:, 2 * c, r, k], mixed[:, 2 * c + 1, r, k] = x[:, c, r, k], x[:, c, r, k] ** 2
    exclusive = np.stack([x[:, :c].sum(1) for c in range(8)], axis=1)
    wanted = [x / (1 + np.exp(-x)), shuffled, x, mixed, exclusive, np.full_like(x, 2.5)]
    wanted.append(x[:, :, 1:, 1:-2])
    close(evaluate(build, [x], tmp_path), wanted)


def test_dequantize(tmp_path: Path) -> None:
    scale, zero_point = np.float32([0.1, 0.02, 0.3]), np.int8([3, -4, 0])

    def build(x):
        stored = mb.quantize(
            input=x, scale=scale, zero_point=zero_point, axis=1, output_dtype="int8"
        )
        return mb.dequantize(input=stored, scale=scale, zero_point=zero_point, axis=1)

    wanted = np.empty_like(X)
    for c in range(3):
        stored = np.clip(np.round(X[:, c] / scale[c]) + zero_point[c], -128, 127)
        wanted[:, c] = (stored - zero_point[c]) * scale[c]
    close(evaluate(build, [X], tmp_path), [wanted])


def compressed_ios16():
    bits = RNG.integers(0, 256, 9, dtype=np.uint8)  # 18 indices of 4 bits
    return {
        "affine-axis": mb.constexpr_affine_dequantize(
            quantized_data=RNG.integers(-128, 128, (3, 6)).astype(np.int8),
            zero_point=np.int8([1, -2, 3]),
            scale=np.float32([0.1, 0.2, 0.3]),
            axis=0,
        ),
        "affine-tensor": mb.constexpr_affine_dequantize(
            quantized_data=RNG.integers(0, 256, (3, 6)).astype(np.uint8),
            zero_point=np.uint8(128),
            scale=np.float32(0.1),
            axis=0,
        ),
        "lut": mb.constexpr_lut_to_dense(indices=bits, lut=normal(16), shape=np.uint32([3, 6])),
        "sparse": mb.constexpr_sparse_to_dense(
            nonzero_data=np.float32([1, 2, 3, 4]),
            mask=np.uint8([0b10000001, 0b00000001, 0b10]),
            shape=np.uint32([3, 6]),
        ),
        "cast": mb.constexpr_cast(source_val=normal(3, 6).astype(np.float16), output_dtype="fp32"),
    }


def compressed_ios18():
    four_bits = types.nptype_from_builtin(types.int4)
    indices = types.nptype_from_builtin(types.uint4)
    mask = np.zeros((3, 6), types.nptype_from_builtin(types.uint1))
    mask[1, 2:5] = 1
    return {
        "block-int8": mb.constexpr_blockwise_shift_scale(
            data=RNG.integers(-128, 128, (3, 6)).astype(np.int8),
            scale=positive(3, 2),
            offset=RNG.integers(-9, 9, (3, 2)).astype(np.int8),
        ),
        "block-int4": mb.constexpr_blockwise_shift_scale(
            data=RNG.integers(-8, 8, (3, 6)).astype(four_bits), scale=positive(1, 3)
        ),
        "block-fp16": mb.constexpr_blockwise_shift_scale(
            data=RNG.integers(-128, 128, (3, 6)).astype(np.int8),
            scale=positive(3, 1).astype(np.float16),
        ),
        "lut": mb.constexpr_lut_to_dense(
            indices=RNG.integers(0, 16, (3, 6)).astype(indices), lut=normal(3, 2, 16, 1)
        ),
        "lut-vector": mb.constexpr_lut_to_dense(
            indices=RNG.integers(0, 16, (3, 3)).astype(indices),
            lut=normal(1, 1, 16, 2),
            vector_axis=1,
        ),
        "sparse": mb.constexpr_sparse_to_dense(nonzero_data=np.float32([1, 2, 3]), mask=mask),
    }


@pytest.mark.parametrize(
    ("compressed", "target"),
    [(compressed_ios16, ct.target.iOS17), (compressed_ios18, ct.target.iOS18)],
    ids=["ios16", "ios18"],
)
def test_compressed_constants_agree_with_materialised_values(
    compressed: Callable, target, tmp_path: Path
) -> None:
    wanted = []

    def build(x):
        results = []
        for var in compressed().values():
            wanted.append(var.op.materialized_val_inference().astype(np.float32))
            half = var.dtype == types.fp16
            source = mb.cast(x=x, dtype="fp16") if half else x
            product = mb.mul(x=source, y=var)
            results.append(mb.cast(x=product, dtype="fp32") if half else product)
        return results

    ones = np.ones((3, 6), np.float32)
    found = evaluate(build, [ones], tmp_path, target)
    close(found, wanted[-len(found) :])


def test_every_kernel_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    named = {*ONE_INPUT, *TWO_INPUTS, *REDUCTIONS}
    missing = [name for name in KERNELS if name not in named and f"mb.{name}(" not in source]
    # The attention test calls its operation through a local name.
    assert missing == ["scaled_dot_product_attention"]
