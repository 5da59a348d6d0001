"""Intervals hold on new subjects of a head that was really trained, and a wrong one is caught."""

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from scipy import stats

from dinotrain.calibration import calibrate, largest_factor
from dinotrain.decoders import MeasureDecoder
from dinotrain.encoding import Encoding
from dinotrain.errors import UsageError
from dinotrain.heads.branch import BranchHead, BranchSpec, HeadConfig
from dinotrain.intervals import Intervals
from dinotrain.objectives.measure import MeasureObjective, choose_loss
from dinotrain.tasks import get_task
from dinotrain.tasks.eyelid import join_gazes
from dinotrain.train_config import TrainConfig

TASK = get_task("eyelid")
NAMES = tuple(t.output_name for t in TASK.targets)
WIDTH, COVERAGE = 10, 0.9
TRAIN, HELD, NEW = 60, 150, 600


class People(NamedTuple):
    """Subjects with one sample each."""

    features: dict[str, torch.Tensor]
    labels: np.ndarray


def people(count: int, seed: int) -> People:
    """Draw distances that depend on features, with noise that depends on them too."""
    rng = np.random.default_rng(seed)
    x = {name: rng.normal(size=(count, WIDTH)) for name in ("primary", "up", "down")}
    noise = rng.normal(size=(count, 3)) * np.exp(0.5 * x["primary"][:, 2:3])
    lift = x["up"][:, 0] - x["down"][:, 0]
    means = (3 + x["primary"][:, 0], 6 + x["primary"][:, 1], 14 + lift)
    labels = np.stack(means, axis=1) + 0.5 * noise
    return People({k: torch.from_numpy(v).float() for k, v in x.items()}, labels)


Predict = Callable[[People, Intervals | None], dict[str, np.ndarray]]


LEARNT = ("gaussian-mlp-15", "gaussian-ensemble-15", "gray-ensemble-15")
BY_HEART = ("scalar-mlp-150", "gaussian-mlp-150", "gaussian-ensemble-150", "gray-ensemble-150")


@pytest.fixture(scope="module")
def predict(request, tmp_path_factory) -> Predict:
    """Train a head on 60 subjects for some steps; return how it predicts."""
    kind, head_kind, steps = request.param.split("-")
    config = TrainConfig(
        data=tmp_path_factory.getbasetemp(),
        backbone="none",
        out=tmp_path_factory.getbasetemp() / "a.safetensors",
        encoding=Encoding(kind=kind, bits=6),
        head=HeadConfig(kind=head_kind, hidden=64, dropout=0.0, members=3),
    )
    config = msgspec.structs.replace(config, loss=choose_loss(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        branches = [
            BranchSpec(b.name, b.inputs_read * WIDTH, len(b.targets)) for b in TASK.branches
        ]
        head = BranchHead(branches, config.encoding.width, config.head)
    decoder = MeasureDecoder(config.encoding, TASK.targets)
    objective = MeasureObjective(config, head, decoder)
    known = people(TRAIN, 0)
    objective.start_(known.labels)
    labels = torch.from_numpy(known.labels)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(int(steps)):
        optimizer.zero_grad()
        objective.loss(head(join_gazes(known.features)), labels).backward()
        optimizer.step()
    state = decoder.state_dict()

    @torch.no_grad()
    def run(who: People, intervals: Intervals | None) -> dict[str, np.ndarray]:
        made = MeasureDecoder(config.encoding, TASK.targets, intervals)
        made.load_state_dict(state)
        outputs = made(head.eval()(join_gazes(who.features)))
        return {name: value.double().numpy() for name, value in outputs.items()}

    return run


def judged(predict: Predict, calibrated_on: People) -> tuple[Intervals, dict[str, dict]]:
    """Calibrate, bake, and judge on subjects that nothing has seen."""
    subjects = np.arange(len(calibrated_on.labels)).tolist()
    raw = predict(calibrated_on, None)
    intervals, reason = TASK.calibrate(raw, calibrated_on.labels, subjects, COVERAGE)
    assert intervals is not None, reason
    new = people(NEW, 2)
    rows = TASK.evaluate(
        predict(new, intervals), new.labels, people(TRAIN, 0).labels, subjects=list(range(NEW))
    )
    return intervals, rows


@pytest.mark.parametrize("predict", (*LEARNT, *BY_HEART), indirect=True)
def test_new_subjects_are_covered_as_promised(predict):
    intervals, rows = judged(predict, people(HELD, 1))
    assert intervals.subjects == (HELD,) * 3
    rank = int(np.ceil((HELD + 1) * COVERAGE))
    # How many of NEW a calibration on HELD covers is beta-binomial, whatever the model is.
    least, most = stats.betabinom(NEW, rank, HELD + 1 - rank).interval(0.9999)
    for name in NAMES:
        row = rows[name]
        assert least <= row["interval_subjects_covered"] * NEW <= most
        assert row["interval_rows_covered"] == row["interval_subjects_covered"]
        assert 0 < row["interval_width_mm"] < np.inf


@pytest.mark.parametrize("predict", BY_HEART, indirect=True)
def test_calibrating_on_training_subjects_is_caught(predict):
    """The planted fault: a head that knows its subjects by heart looks sure on them."""
    _, rows = judged(predict, people(TRAIN, 0))
    rank = int(np.ceil((TRAIN + 1) * COVERAGE))
    least = stats.betabinom(NEW, rank, TRAIN + 1 - rank).ppf(0.0001)
    assert all(rows[name]["interval_subjects_covered"] * NEW < least for name in NAMES)


@pytest.mark.parametrize(
    ("predict", "method"),
    [
        ("gaussian-mlp-15", "scaled"),
        ("gaussian-ensemble-15", "scaled"),
        # Members that learnt by heart, or on bits, agree better than they are right.
        ("gaussian-mlp-150", "absolute"),
        ("gray-ensemble-150", "absolute"),
        ("scalar-mlp-150", "absolute"),
    ],
    indirect=["predict"],
)
def test_what_is_no_deviation_of_the_errors_is_not_scaled(predict, method):
    intervals, _ = judged(predict, people(HELD, 1))
    assert intervals.method == method
    assert method == "absolute" or max(intervals.factors) <= largest_factor(COVERAGE)


def outputs(count: int, std: float | None = 1.0) -> dict[str, np.ndarray]:
    made = {name: np.zeros(count) for name in NAMES}
    if std is not None:
        made |= {t.std_name: np.full(count, std) for t in TASK.targets}
    return made


def test_factors_by_hand():
    true = np.stack([np.arange(1.0, 11.0), np.arange(11.0, 21.0), np.arange(21.0, 31.0)], axis=1)
    true[0, 2] = np.nan
    subjects = [f"s{index}" for index in range(10)]
    # ⌈11 · 0.9⌉ = 10th of ten scores; of nine ⌈10 · 0.9⌉ = 9th; all divided by σ = 20.
    made, reason = calibrate(outputs(10, 20.0), true, subjects, 0.9, TASK.targets)
    assert made == Intervals(
        method="scaled", coverage=0.9, factors=(0.5, 1.0, 1.5), subjects=(10, 10, 9)
    )
    assert reason == ""
    made, _ = calibrate(outputs(10, None), true, subjects, 0.9, TASK.targets)
    assert made is not None
    assert (made.method, made.factors) == ("absolute", (10.0, 20.0, 30.0))


def test_a_deviation_of_zero_is_not_scaled():
    predicted = outputs(10)
    predicted["lf_std_mm"][3] = 0.0
    made, _ = calibrate(predicted, np.ones((10, 3)), list(range(10)), 0.9, TASK.targets)
    assert made is not None
    assert (made.method, made.factors) == ("absolute", (1.0, 1.0, 1.0))


def test_too_few_subjects_give_a_reason():
    true = np.ones((12, 3))
    true[3:, 2] = np.nan
    made, reason = calibrate(outputs(12), true, list(range(12)), 0.9, TASK.targets)
    assert made is None
    assert reason.startswith("no intervals: lf_mm: 3 labelled subjects cannot calibrate 0.9")
    # Two eyes of one person count once.
    made, reason = calibrate(
        outputs(12), np.ones((12, 3)), [i // 2 for i in range(12)], 0.9, TASK.targets
    )
    assert made is None
    assert reason.startswith("no intervals: mrd1_mm: 6 labelled subjects")


def test_other_tasks_have_none_and_give_no_reason():
    assert get_task("classify").calibrate({}, np.zeros((0, 1)), [], 0.9) == (None, "")


def test_a_coverage_that_is_none_is_refused():
    with pytest.raises(UsageError, match=r"coverage is 1\.0"):
        calibrate(outputs(9), np.ones((9, 3)), list(range(9)), 1.0, TASK.targets)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_largest_factor_is_reached_and_not_beaten(rows):
    """The worst law for k: ±k with probability 1/2k² each, else 0; its variance is 1."""
    for nearly, needed in ((0.999, True), (1.001, False)):
        k = nearly * largest_factor(COVERAGE, rows)
        assert k**2 * (1 / k**2) == pytest.approx(1)
        # Rows that never miss together miss most often; less than k leaves all of them out.
        missed = rows / k**2
        assert (missed > 1 - COVERAGE) == needed


def test_choosing_the_method_on_the_same_subjects_costs_no_coverage():
    """The worst case: σ̂ so much too small that one calibration in two refuses to scale."""
    rng = np.random.default_rng(0)
    target, chosen, held = TASK.targets[:1], [], []
    for _ in range(1500):
        sure = rng.uniform(0.3, 1, 31)
        true = sure * rng.normal(size=31)
        # The 90 % point of |N(0, 1)| is 1.645: factors scatter around the limit of 3.16.
        std = sure * 1.645 / largest_factor(COVERAGE)
        predicted = {"mrd1_mm": np.zeros(30), "mrd1_std_mm": std[:30]}
        made, _ = calibrate(predicted, true[:30, None], list(range(30)), COVERAGE, target)
        assert made is not None
        half = made.factors[0] * (std[30] if made.method == "scaled" else 1)
        chosen.append(made.method)
        held.append(abs(true[30]) <= half)
    assert 0.3 < chosen.count("scaled") / 1500 < 0.7
    # Between coverage and coverage + 1/31; 1500 draws have a standard error of 0.01.
    assert COVERAGE - 0.03 <= np.mean(held) <= COVERAGE + 1 / 31 + 0.03
