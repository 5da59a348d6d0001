"""The objective of measured values: which loss fits, what it adds up to, and what it reports."""

import math

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinotrain.decoders import MeasureDecoder
from dinotrain.encoding import Encoding
from dinotrain.errors import UsageError
from dinotrain.heads.branch import BranchHead, BranchSpec, HeadConfig
from dinotrain.heads.query import QueryConfig, QueryHead
from dinotrain.losses.orthogonality import task_orthogonality
from dinotrain.metrics.uncertainty import bit_calibration_error
from dinotrain.objectives.measure import MeasureObjective, choose_loss
from dinotrain.tasks import get_task
from dinotrain.train_config import TrainConfig

TASK = get_task("eyelid")
MEAN, STD = (3.0, 6.0, 14.0), (1.5, 1.2, 4.0)
BITS = {"plain": 4, "gray": 4, "thermometer": 3, "johnson": 3}
NAN = float("nan")


def settings(tmp_path, kind: str, **fields) -> TrainConfig:
    config = TrainConfig(
        data=tmp_path,
        backbone="none",
        out=tmp_path / "a.safetensors",
        encoding=Encoding(kind=kind, bits=BITS.get(kind, 8)),
        head=HeadConfig(kind="ensemble", hidden=6, members=2, dropout=0.0),
    )
    config = msgspec.structs.replace(config, **fields)
    return msgspec.structs.replace(config, loss=choose_loss(config))


def objective(config: TrainConfig, head: nn.Module | None = None) -> MeasureObjective:
    torch.manual_seed(3)
    head = head or BranchHead(
        [BranchSpec("mrd", 5, 2), BranchSpec("lf", 7, 1)], config.encoding.width, config.head
    )
    decoder = MeasureDecoder(config.encoding, TASK.targets)
    decoder.mean.copy_(torch.tensor(MEAN))
    decoder.std.copy_(torch.tensor(STD))
    return MeasureObjective(config, head, decoder)  # type: ignore[arg-type]


@pytest.fixture
def labels() -> torch.Tensor:
    rng = np.random.default_rng(0)
    values = rng.normal(MEAN, STD, size=(6, 3))
    values[0, 2] = values[4, 0] = np.nan
    return torch.from_numpy(values)


def logits(config: TrainConfig) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(6, 2, 3, config.encoding.width, generator=draw)


def test_the_default_loss_of_each_encoding(tmp_path):
    chosen = {k: settings(tmp_path, k).loss for k in ("gray", "johnson", "scalar", "gaussian")}
    assert chosen == {"gray": "bce", "johnson": "bce", "scalar": "mse", "gaussian": "nll"}


@pytest.mark.parametrize(
    ("kind", "loss", "accepted"),
    [
        ("gray", "nll", "bce, focal"),
        ("thermometer", "mse", "bce, focal"),
        ("johnson", "focal_r", "bce, focal"),
        ("scalar", "bce", "mse, focal_r"),
        ("scalar", "nll", "mse, focal_r"),
        ("gaussian", "mse", "nll"),
        ("plain", "cross_entropy", "bce, focal"),
    ],
)
def test_losses_that_do_not_fit_are_refused(tmp_path, kind, loss, accepted):
    message = f"loss '{loss}' does not fit encoding '{kind}' of task eyelid; accepted: {accepted}$"
    with pytest.raises(UsageError, match=message):
        settings(tmp_path, kind, loss=loss)


@pytest.mark.parametrize("kind", ["thermometer", "johnson", "scalar", "gaussian"])
def test_weights_of_bits_that_are_all_alike_are_refused(tmp_path, kind):
    with pytest.raises(UsageError, match=f"encoding '{kind}' has none that are finer"):
        settings(tmp_path, kind, bit_rho=0.5)


def one_by_one(config: TrainConfig, found: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean of the loss over labels and members, each from plain Python numbers."""
    terms = []
    for row in range(labels.shape[0]):
        for column, target in enumerate(TASK.targets):
            y = labels[row, column].item()
            if math.isnan(y):
                continue
            for member in range(found.shape[1]):
                out = found[row, member, column].double().tolist()
                z = (y - MEAN[column]) / STD[column]
                terms.append(term(config, out, z, (y - target.low) / target.span))
    return sum(terms) / len(terms)


def term(config: TrainConfig, out: list[float], z: float, unit: float) -> float:
    if config.loss == "mse":
        return (out[0] - z) ** 2
    if config.loss == "focal_r":
        error = abs(out[0] - z)
        return error**2 / (1 + math.exp(-config.focal_r_beta * error)) ** config.gamma
    if config.loss == "nll":
        return 0.5 * (out[1] + (z - out[0]) ** 2 / math.exp(out[1]))
    level = min(max(int(unit * config.encoding.levels), 0), config.encoding.levels - 1)
    total = 0.0
    for number, bit in zip(out, code(config, level), strict=True):
        right = 1 / (1 + math.exp(-number if bit else number))
        total -= (1 - right) ** (config.gamma if config.loss == "focal" else 0) * math.log(right)
    return total


def code(config: TrainConfig, level: int) -> list[int]:
    kind, width = config.encoding.kind, config.encoding.width
    if kind == "thermometer":
        return [int(level >= k) for k in range(1, width + 1)]
    if kind == "johnson":
        return [int(width - i <= level < 2 * width - i) for i in range(width)]
    number = level ^ (level >> 1) if kind == "gray" else level
    return [int(c) for c in format(number, f"0{width}b")]


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        *((kind, loss) for kind in BITS for loss in ("bce", "focal")),
        ("scalar", "mse"),
        ("scalar", "focal_r"),
        ("gaussian", "nll"),
    ],
)
def test_each_loss_one_by_one(tmp_path, labels, kind, loss):
    config = settings(tmp_path, kind, loss=loss, gamma=1.5, focal_r_beta=0.7, orthogonality="none")
    found = objective(config).loss(logits(config), labels)
    wanted = one_by_one(config, logits(config), labels)
    # float32; of the likelihood also the floor of the variance, 1e-6 of e^−3 and more.
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_a_loss_of_the_wrong_code_is_caught(tmp_path, labels):
    """The planted fault: Gray bits judged as plain ones do not pass for the formula."""
    gray = settings(tmp_path, "gray", orthogonality="none")
    plain = settings(tmp_path, "plain", orthogonality="none")
    found = objective(gray).loss(logits(gray), labels).item()
    assert found != pytest.approx(one_by_one(plain, logits(plain), labels), rel=1e-2)


@pytest.mark.parametrize("kind", ["gray", "gaussian"])
def test_orthogonality_is_added_with_its_weight(tmp_path, labels, kind):
    def total(**fields) -> float:
        config = settings(tmp_path, kind, **fields)
        return objective(config).loss(logits(config), labels).item()

    head = objective(settings(tmp_path, kind)).head
    rows = [F.normalize(w, dim=-1) for w in head.output_weights() if len(w) == 2]
    task = np.mean([(r[0] @ r[1].T).square().mean().item() for r in rows])
    hidden = []
    for member in head.members:  # type: ignore[union-attr]
        for branch in ("mrd", "lf"):
            weight = member[branch][1].weight  # type: ignore[index]
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            hidden.append((gram - torch.eye(len(gram))).square().mean().item())
    plain = total(orthogonality="none")
    assert total(orthogonality="grad") == plain
    assert total(orthogonality="task", or_lambda=0.0) == plain
    assert total(orthogonality="task", or_lambda=0.5) - plain == pytest.approx(0.5 * task, rel=1e-3)
    assert total(orthogonality="so", or_lambda=0.5) - plain == pytest.approx(
        0.5 * np.mean(hidden), rel=1e-3
    )


@pytest.mark.parametrize("kind", ["linear", "probe"])
def test_so_without_hidden_layers_is_refused(tmp_path, kind):
    config = settings(tmp_path, "gray", orthogonality="so", head=HeadConfig(kind=kind))
    with pytest.raises(UsageError, match=f"head '{kind}' has none. Use task or none"):
        objective(config)


@pytest.mark.parametrize("orthogonality", ["task", "so"])
def test_a_query_head_is_regularised_too(tmp_path, orthogonality):
    config = settings(tmp_path, "gray", orthogonality=orthogonality)
    head = QueryHead(("primary",), 5, 3, 4, QueryConfig(dim=8, heads=2, hidden=12, layers=1))
    made = objective(config, head).loss(torch.zeros(6, 1, 3, 4), torch.full((6, 3), NAN))
    made.backward()
    reached = {name for name, p in head.named_parameters() if p.grad is not None}
    outputs = {f"outputs.{i}.weight" for i in range(3)}
    if orthogonality == "task":
        assert reached == outputs
        assert made.item() == pytest.approx(0.1 * task_orthogonality(head.output_weights()).item())
    else:
        linear = {f"{n}.weight" for n, m in head.named_modules() if isinstance(m, nn.Linear)}
        assert reached == linear - outputs


def test_grad_tells_how_far_targets_pull_the_same_way(tmp_path, labels):
    config = settings(tmp_path, "scalar", orthogonality="grad")
    made = objective(config)
    draw = torch.Generator().manual_seed(5)
    primary = torch.randn(6, 5, generator=draw).requires_grad_()
    gazes = torch.randn(6, 7, generator=draw).requires_grad_()
    found = made.diagnose(made.head({"mrd": primary, "lf": gazes}), labels, (primary, gazes))
    gradients = []
    for column in range(3):
        one = torch.full_like(labels, NAN)
        one[:, column] = labels[:, column]
        loss = made.loss(made.head({"mrd": primary, "lf": gazes}), one)
        parts = torch.autograd.grad(loss, (primary, gazes), allow_unused=True)
        gradients.append([0.0 if p is None else p for p in parts])
    # MRD1 and MRD2 read one picture, LF the others: only the first two of three pairs can meet.
    cosine = F.cosine_similarity(gradients[0][0].flatten(), gradients[1][0].flatten(), dim=0).item()
    assert found == {"gradient_overlap": pytest.approx(cosine**2 / 3, rel=1e-4)}
    assert 0 < found["gradient_overlap"] <= 1 / 3


def test_other_kinds_report_nothing(tmp_path, labels):
    made = objective(settings(tmp_path, "scalar"))
    assert made.diagnose(torch.zeros(6, 2, 3, 1), labels, ()) == {}


def test_bits_are_judged_by_their_mean_over_members(tmp_path, labels):
    config = settings(tmp_path, "gray")
    found = objective(config).bit_calibration(logits(config), labels.numpy())
    p = (1 / (1 + np.exp(-logits(config).double().numpy()))).mean(axis=1)
    for column, target in enumerate(TASK.targets):
        rows = [r for r in range(6) if not math.isnan(labels[r, column].item())]
        levels = [
            int((labels[r, column].item() - target.low) / target.span * config.encoding.levels)
            for r in rows
        ]
        bits = np.array([code(config, level) for level in levels])
        wanted = bit_calibration_error(p[rows, column], bits)
        assert found[target.output_name] == pytest.approx(wanted.tolist(), abs=1e-6)
    nothing = objective(config).bit_calibration(logits(config), np.full((6, 3), NAN))
    assert nothing["lf_mm"] == [None] * 4
    assert objective(settings(tmp_path, "gaussian")).bit_calibration(labels, labels.numpy()) == {}


def test_a_gaussian_starts_at_the_labels_own_mean_and_spread(tmp_path, labels):
    config = settings(tmp_path, "gaussian")
    made = objective(config)
    made.start_(labels.numpy())
    for weight in made.head.output_weights():
        weight.data.zero_()
    vectors = {"mrd": torch.randn(1, 5), "lf": torch.randn(1, 7)}
    given = made.decoder(made.head(vectors))
    for column, target in enumerate(TASK.targets):
        known = labels[:, column][~labels[:, column].isnan()]
        assert given[target.output_name].item() == pytest.approx(known.mean().item(), rel=1e-5)
        spread = known.std(correction=0).item()
        assert given[target.std_name].item() == pytest.approx(spread, rel=1e-5)


def test_validation_reads_the_values_alone(tmp_path):
    made = objective(settings(tmp_path, "gaussian"))
    true = np.array([[1.0, 2.0, NAN], [3.0, NAN, NAN]])
    predicted = {t.output_name: np.array([2.0, 5.0]) for t in TASK.targets}
    predicted |= {t.std_name: np.array([9.0, 9.0]) for t in TASK.targets}
    # mrd1: (1 + 2)/2; mrd2: 0; lf has no label.
    assert made.validation_error(predicted, true) == pytest.approx(0.75)
    assert made.validation_error(predicted, np.full((2, 3), NAN)) is None
