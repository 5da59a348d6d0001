"""The verdict: an artifact that gives the reference's values passes, one fault anywhere fails."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dinoexport.errors import ParityError
from dinoexport.manifest import Verdict
from dinoexport.recipes import PRECISIONS, parse_recipe
from dinoexport.targets.base import Cut, RunResult, Runtime, Target, whole
from dinoexport.verify.metrics import MAX_DB
from dinoexport.verify.norms import Norm
from dinoexport.verify.parity import (
    EPSILON_TOLERANCE,
    LEAST_COSINE,
    STRUCTURE_DB,
    budget_of,
    compare_norms,
    judge_outputs,
    judge_similarity,
    run_samples,
    verify_artifact,
)
from dinoexport.verify.reference import Reference, Values
from dinoexport.verify.reference_file import encode_reference, load_reference
from dinotrain.tasks import get_task

TAPS = ("tokens", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "features")
PLACES = {tap: f"value_{index}" for index, tap in enumerate(TAPS)}
TASK = get_task("eyelid")
BUDGET = {
    "fp32": TASK.budgets.float32,
    "fp16": TASK.budgets.float16,
    "w8": TASK.budgets.weights8,
    "w4-block32": TASK.budgets.weights4,
}
FP16 = parse_recipe("fp16")
Change = Callable[[np.ndarray], np.ndarray]


# --- an artifact that gives the reference's values -----------------------------------------------


@dataclass
class Plan:
    """What the fake artifact does wrong; each change gets the array of one sample."""

    shipped: dict[str, Change] = field(default_factory=dict)
    precise_taps: dict[str, Change] = field(default_factory=dict)
    exact: dict[str, Change] = field(default_factory=dict)
    exact_taps: dict[str, Change] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    gelu: frozenset[str] = frozenset({"exact"})
    epsilons: list[float] | None = None


class FakeRuntime(Runtime):
    def __init__(
        self, reference: Reference, values: Values, changes: dict[str, Change], plan: Plan
    ) -> None:
        self.name = "fake 1.0"
        self._reference = reference
        self._values = values
        self._changes = changes
        self._plan = plan

    def run(self, images: Mapping[str, np.ndarray], cut: Cut = whole) -> RunResult:
        """Recognise the sample by its images."""
        reference = self._reference
        index = next(
            i
            for i in range(reference.samples)
            if all(np.array_equal(images[n], a) for n, a in reference.sample(i).items())
        )
        if len(next(iter(self._values.outputs.values()))) < reference.samples:
            index = reference.few.index(index)
        outputs = {n: v[index].reshape(1) for n, v in self._values.outputs.items()}
        taps = {n: self._whole(n, v[index]) for n, v in self._values.taps.items()}
        for name, change in self._changes.items():
            held = outputs if name in outputs else taps
            held[name] = change(held[name].copy())
        for name in self._plan.drop:
            outputs.pop(name, None)
            taps.pop(name, None)
        outputs |= {n: np.zeros(1, np.float32) for n in self._plan.more if n.endswith("_mm")}
        taps |= {n: np.zeros(1, np.float32) for n in self._plan.more if not n.endswith("_mm")}
        return RunResult(outputs, {name: cut(name, value) for name, value in taps.items()})

    def _whole(self, name: str, sketch: np.ndarray) -> np.ndarray:
        """A tap in full; what the reference does not hold of it is not looked at."""
        places = self._reference.positions[name]
        whole = np.full(int(places.max()) + 1, np.nan, np.float32)
        whole[places] = sketch
        return whole[None]


class FakeTarget(Target):
    name = "fake"
    suffix = ".fake"

    def __init__(self, reference: Reference, precision: str, plan: Plan) -> None:
        self.reference = reference
        self.recipe = parse_recipe(precision)
        self.plan = plan
        self.opened: list[tuple[bool, bool]] = []

    def runtime(
        self, path: Path, taps: Mapping[str, str] | None = None, *, exact: bool = False
    ) -> Runtime:
        assert path.name == "model.fake"
        assert not taps or dict(taps) == PLACES
        self.opened.append((bool(taps), exact))
        if exact:
            values = self.reference.structural(self.recipe)
            changes = self.plan.exact | self.plan.exact_taps
        else:
            values = self.reference.exact
            changes = self.plan.precise_taps if taps else self.plan.shipped
        if not taps:
            values = Values(values.outputs, {})
        return FakeRuntime(self.reference, values, changes, self.plan)

    def gelu_forms(self, path: Path) -> set[str]:
        return set(self.plan.gelu)

    def norm_epsilons(self, path: Path) -> list[float]:
        if self.plan.epsilons is not None:
            return self.plan.epsilons
        return [n.epsilon for n in self.reference.norms(self.recipe)]

    def lower(self, program, path, options, metadata):
        raise NotImplementedError

    def read_metadata(self, path: Path) -> dict[str, str]:
        raise NotImplementedError

    def count_operations(self, path: Path) -> dict[str, int]:
        raise NotImplementedError


@pytest.fixture
def verdict(reference: Reference) -> Callable[..., Verdict]:
    """Verify the fake artifact with what a plan does wrong."""

    def verify(precision: str = "fp16", progress=None, **wrong) -> Verdict:
        target = FakeTarget(reference, precision, Plan(**wrong))
        path = Path("somewhere/model.fake")
        result = verify_artifact(
            target, path, PLACES, parse_recipe(precision), reference, TASK, progress
        )
        # Outputs are those of the file as it ships; taps may make a runtime do otherwise.
        assert target.opened == [(True, False), (False, False), (True, True)]
        return result

    return verify


def add(amount: float) -> Change:
    return lambda value: value + np.float32(amount)


def at_db(level: float) -> Change:
    """Noise of a fixed pattern, so that the SQNR comes to ``level``."""

    def change(value: np.ndarray) -> np.ndarray:
        known = np.isfinite(value)
        pattern = np.random.default_rng(1).standard_normal(value.shape)
        scale = np.sqrt((value[known] ** 2.0).sum() / (pattern[known] ** 2).sum())
        return (value + scale * 10 ** (-level / 20) * pattern).astype(np.float64)

    return change


def put(number: float) -> Change:
    def change(value: np.ndarray) -> np.ndarray:
        value[np.isfinite(value)] = number
        return value

    return change


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_references_own_values_pass(verdict, reference: Reference, precision: str) -> None:
    steps: list[tuple[int, int]] = []
    result = verdict(precision, lambda done, total: steps.append((done, total)))
    assert result.passed is True
    assert result.blame is None
    assert result.structure.passed is True
    assert result.structure.worst_db == MAX_DB
    assert result.structure.threshold_db == STRUCTURE_DB
    assert list(result.taps) == list(TAPS)
    for tap in result.taps.values():
        assert tap.structure_db == tap.precision_db == MAX_DB
    assert set(result.outputs) == {"mrd1_mm", "mrd2_mm", "lf_mm"}
    for output in result.outputs.values():
        assert (output.max_error, output.sqnr_db, output.passed) == (0.0, MAX_DB, True)
        assert (output.unit, output.budget) == ("mm", BUDGET[precision])
    assert result.runtime == result.structure.runtime == "fake 1.0"
    assert result.reference.samples == reference.samples == 6
    assert result.reference.checkpoint_sha256 == reference.info.checkpoint_sha256
    assert steps == [(done, 10) for done in range(1, 11)]


def test_structure_is_compared_with_rounded_weights(reference: Reference) -> None:
    """An fp16 file judged by the reference of fp32 would be 50 dB short."""
    target = FakeTarget(reference, "fp32", Plan(epsilons=[1e-6] * 5 + [1e-5] * 2))
    result = verify_artifact(target, Path("model.fake"), PLACES, FP16, reference, TASK)
    assert not result.passed
    assert result.structure.worst_db < 90
    assert result.blame
    assert result.blame.layer == "tokens"


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("level", [STRUCTURE_DB - 0.5, 30.0])
def test_one_tap_off_is_blamed(verdict, tap: str, level: float) -> None:
    result = verdict(exact_taps={tap: at_db(level)})
    assert not result.passed
    assert not result.structure.passed
    assert result.structure.worst_tap == tap
    # Written in tenths.
    assert result.structure.worst_db == pytest.approx(level, abs=0.2)
    assert result.blame
    assert (result.blame.gate, result.blame.layer) == ("structure", tap)
    # The outputs are perfect, and it fails.
    assert all(output.passed for output in result.outputs.values())


@pytest.mark.parametrize("tap", TAPS)
def test_just_above_the_threshold_passes(verdict, tap: str) -> None:
    result = verdict(exact_taps={tap: at_db(STRUCTURE_DB + 0.5)})
    assert result.passed
    assert result.structure.worst_tap == tap


def test_the_first_of_several_taps_is_blamed(verdict) -> None:
    off = {"blocks.0.mlp": at_db(100), "blocks.1.attn": at_db(20), "features": at_db(10)}
    result = verdict(exact_taps=off)
    assert result.structure.worst_tap == "features"
    assert result.blame.layer == "blocks.0.mlp"
    assert result.blame.previous_layer == "blocks.0.attn"


@pytest.mark.parametrize("number", [np.nan, np.inf, 0.0])
def test_a_tap_of_one_number_is_blamed(verdict, number: float) -> None:
    result = verdict(exact_taps={"blocks.1.attn": put(number)})
    assert not result.passed
    assert result.blame.layer == "blocks.1.attn"
    assert result.structure.worst_db <= 0


def test_one_sample_is_enough(verdict, reference: Reference) -> None:
    """The sums run over all samples; one that is wrong must not drown."""
    first = reference.exact.outputs["lf_mm"][0]
    only_first = {"lf_mm": lambda v: v + np.float32(0.05) * (v == first)}
    result = verdict(shipped=only_first)
    assert not result.passed
    assert result.outputs["lf_mm"].max_error == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("output", ["mrd1_mm", "mrd2_mm", "lf_mm"])
def test_an_output_off_as_shipped(verdict, output: str) -> None:
    for precision in ("fp32", "fp16"):
        inside, outside = (factor * BUDGET[precision] for factor in (0.9, 1.1))
        good = verdict(precision, shipped={output: add(inside)})
        assert good.passed
        # mm in float32 around 20 are known to 2e-6.
        assert good.outputs[output].max_error == pytest.approx(inside, abs=5e-6)
        bad = verdict(precision, shipped={output: add(-outside)})
        assert not bad.passed
        assert bad.structure.passed
        assert [n for n, o in bad.outputs.items() if not o.passed] == [output]
        assert (bad.blame.gate, bad.blame.layer) == ("precision", "head")
        assert output in bad.blame.message


def test_an_output_off_in_exact_arithmetic(verdict) -> None:
    """Within the budget of fp16, and no tap sees it: only the structural outputs do."""
    result = verdict(exact={"lf_mm": add(1.2 * BUDGET["fp32"])})
    assert not result.passed
    assert not result.structure.passed
    assert result.structure.worst_db == MAX_DB
    assert (result.blame.gate, result.blame.layer) == ("structure", "head")
    assert "lf_mm" in result.blame.message


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_no_number(verdict, number: float) -> None:
    result = verdict(shipped={"lf_mm": put(number)})
    assert not result.passed
    assert result.outputs["lf_mm"].sqnr_db == -MAX_DB
    # JSON has no infinity.
    assert np.isfinite(result.outputs["lf_mm"].max_error)


def test_two_outputs_swapped(verdict, reference: Reference) -> None:
    mrd1, mrd2 = (reference.deployed["fp16"].outputs[n] for n in ("mrd1_mm", "mrd2_mm"))
    swap = {
        "mrd1_mm": lambda v: mrd2[np.argmin(np.abs(mrd1 - v))].reshape(1),
        "mrd2_mm": lambda v: mrd1[np.argmin(np.abs(mrd2 - v))].reshape(1),
    }
    result = verdict(exact=swap)
    assert not result.passed
    assert result.blame.layer == "head"


def test_where_precision_is_lost(verdict) -> None:
    """The worst of the shipped file's taps does not fail it; it explains a failed output."""
    falling = {tap: at_db(level) for tap, level in zip(TAPS, (75, 74, 40, 39, 38, 37), strict=True)}
    assert verdict(precise_taps=falling).passed
    result = verdict(precise_taps=falling, shipped={"lf_mm": add(0.03)})
    assert not result.passed
    assert (result.blame.gate, result.blame.layer) == ("precision", "blocks.0.mlp")
    assert result.blame.previous_db == pytest.approx(74, abs=0.2)
    assert result.taps["blocks.0.mlp"].precision_db == pytest.approx(40, abs=0.2)
    assert result.taps["blocks.0.mlp"].structure_db == MAX_DB


@pytest.mark.parametrize("form", ["tanh", "sigmoid"])
def test_another_form_of_gelu_fails_alone(verdict, form: str) -> None:
    for forms in (frozenset({form}), frozenset({form, "exact"})):
        result = verdict(gelu=forms)
        assert not result.passed
        assert result.structure.gelu == tuple(sorted(forms))
        assert result.blame.layer == "gelu"
        assert form in result.blame.message
    # A head without hidden layer over a SwiGLU backbone has no GELU at all.
    assert verdict(gelu=frozenset()).passed


@pytest.mark.parametrize(("place", "layer"), [(0, "blocks.0.attn"), (4, "features"), (6, "head")])
def test_one_epsilon_off_fails_alone(verdict, reference: Reference, place: int, layer: str) -> None:
    epsilons = [n.epsilon for n in reference.norms(FP16)]
    epsilons[place] *= 1.5
    result = verdict(epsilons=epsilons)
    assert not result.passed
    assert result.structure.worst_db == MAX_DB
    assert result.blame.layer == layer
    assert "epsilon" in result.blame.message
    assert len(result.structure.epsilons) == 3


def test_epsilons_of_the_other_precision_fail(verdict) -> None:
    """fp16 stores 1.0133e-6 for 1e-6, which is over the tolerance."""
    assert verdict("fp32", epsilons=[1e-6] * 5 + [1e-5] * 2).passed
    assert not verdict("fp16", epsilons=[1e-6] * 5 + [1e-5] * 2).passed


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"drop": ("lf_mm",)}, "output 'lf_mm' is only in one"),
        ({"more": ("iris_mm",)}, "output 'iris_mm' is only in one"),
        ({"drop": ("blocks.1.mlp",)}, "tap 'blocks.1.mlp' is only in one"),
        ({"more": ("blocks.7.attn",)}, "do not fit the reference ('blocks.7.attn')"),
    ],
)
def test_other_names_are_no_verdict(verdict, wrong: dict, says: str) -> None:
    with pytest.raises(ParityError) as error:
        verdict(**wrong)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tap_of_another_size_is_no_verdict(verdict) -> None:
    with pytest.raises(ParityError, match="made for another architecture or image size"):
        verdict(precise_taps={"tokens": lambda value: value[:, :100]})


def test_values_of_all_samples_are_put_together(reference: Reference) -> None:
    runtime = FakeTarget(reference, "fp16", Plan()).runtime(Path("model.fake"), PLACES)
    values = run_samples(runtime, reference)
    for name, wanted in reference.exact.outputs.items():
        assert np.array_equal(values.outputs[name], wanted)
    for name, wanted in reference.exact.taps.items():
        assert np.array_equal(values.taps[name], wanted)


# --- structure by kernels of two speeds, on some of the samples ----------------------------------


class TwoKernels(FakeTarget):
    """Fast kernels that lose digits at one tap, and slow ones that do what a plan says."""

    def exact_runtimes(self, path: Path, taps: Mapping[str, str]):
        def fast() -> Runtime:
            self.opened.append((True, True))
            values = self.reference.structural(self.recipe)
            changes = {"blocks.0.mlp": at_db(self.lost_db)}
            runtime = FakeRuntime(self.reference, values, changes, Plan())
            runtime.name = "fast"
            return runtime

        return (fast, *super().exact_runtimes(path, taps))

    lost_db = 100.0


@pytest.mark.parametrize(
    ("lost_db", "slow_db", "judged_by", "passed"),
    [
        (115.0, 30.0, "fast", True),
        (105.0, 120.0, "fake 1.0", True),
        (105.0, 104.0, "fake 1.0", False),
    ],
    ids=["fast-holds", "slow-holds", "neither"],
)
def test_the_last_kernels_have_the_last_word(
    reference: Reference, lost_db: float, slow_db: float, judged_by: str, passed: bool
) -> None:
    target = TwoKernels(reference, "fp16", Plan(exact_taps={"blocks.0.mlp": at_db(slow_db)}))
    target.lost_db = lost_db
    recipe = parse_recipe("fp16")
    result = verify_artifact(target, Path("model.fake"), PLACES, recipe, reference, TASK)
    assert result.passed is passed
    assert result.structure.runtime == judged_by
    # Slow kernels run only where they are needed.
    assert target.opened.count((True, True)) == (1 if judged_by == "fast" else 2)


def test_a_reference_of_every_sample_is_judged_on_some(
    reference: Reference, tmp_path: Path
) -> None:
    """Older ones hold what the deploy graph gives on all."""
    every = list(range(reference.samples))
    places = [reference.few.index(i) if i in reference.few else 0 for i in every]
    older = dataclasses.replace(
        reference, deployed={n: v.at(places) for n, v in reference.deployed.items()}
    )
    path = tmp_path / "reference.safetensors"
    path.write_bytes(encode_reference(older))
    held = load_reference(path)
    assert all(len(v.outputs["lf_mm"]) == len(every) for v in held.deployed.values())
    found, wanted = (r.structural(parse_recipe("fp16")) for r in (held, reference))
    for name, tap in wanted.taps.items():
        assert np.array_equal(found.taps[name], tap)


# --- quantised recipes ---------------------------------------------------------------------------


@pytest.fixture
def quantised(reference: Reference) -> Callable[..., Verdict]:
    """Verify a fake artifact of w8, whose numbers are those of fp16 here."""
    whole = dataclasses.replace(
        reference, deployed=reference.deployed | {"w8": reference.deployed["fp16"]}
    )

    def verify(**wrong) -> Verdict:
        target = FakeTarget(whole, "w8", Plan(**wrong))
        recipe = parse_recipe("w8")
        return verify_artifact(target, Path("model.fake"), PLACES, recipe, whole, TASK)

    return verify


def test_quantised_recipes_are_judged_by_angles(quantised, verdict) -> None:
    result = quantised()
    assert result.passed
    assert (result.similarity.worst_cosine, result.similarity.threshold) == (1, LEAST_COSINE[8])
    assert verdict("fp16").similarity is None


def test_a_tap_that_turns_away_fails_whatever_the_outputs_say(quantised) -> None:
    """13 dB of noise is a cosine of 0.976, where 0.98 are wanted."""
    result = quantised(precise_taps={"blocks.1.attn": at_db(13)})
    assert not result.passed
    assert not result.similarity.passed
    assert all(output.passed for output in result.outputs.values())
    assert (result.blame.gate, result.blame.layer) == ("similarity", "blocks.1.attn")
    assert quantised(precise_taps={"blocks.1.attn": at_db(16)}).passed


def test_one_sample_alone_fails(quantised) -> None:
    def turn_one(value: np.ndarray) -> np.ndarray:
        turn_one.count += 1
        return -value if turn_one.count == 3 else value

    turn_one.count = 0
    assert not quantised(precise_taps={"blocks.0.mlp": turn_one}).passed


def test_a_quantised_recipe_has_its_own_budget(quantised) -> None:
    assert quantised(shipped={"lf_mm": add(0.9 * BUDGET["w8"])}).passed
    failed = quantised(shipped={"lf_mm": add(1.1 * BUDGET["w8"])})
    assert failed.blame.gate == "precision"
    assert failed.outputs["lf_mm"].budget == BUDGET["w8"]


def test_structure_is_judged_at_quantised_recipes_too(quantised) -> None:
    failed = quantised(exact_taps={"blocks.0.attn": at_db(96)})
    assert (failed.blame.gate, failed.blame.layer) == ("structure", "blocks.0.attn")


def test_every_precision_has_the_budget_of_how_its_numbers_are_held() -> None:
    weights8 = dict.fromkeys(("w8", "pal8", "w8a16"), "weights8")
    wanted = weights8 | {"w8a8": "static8", "w8a8-dynamic": "dynamic8", "pal6": "weights6"}
    wanted |= {"fp32": "float32", "fp16": "float16", "pal4": "weights4", "w4-block32": "weights4"}
    assert wanted.keys() == PRECISIONS.keys()
    task = SimpleNamespace(budgets=TASK.budgets._make(range(len(TASK.budgets))))
    for name, field_name in wanted.items():
        assert budget_of(task, parse_recipe(name)) == getattr(task.budgets, field_name), name


def test_a_mixture_has_the_budget_of_its_coarsest_part() -> None:
    recipe = parse_recipe("fp16:blocks.0=w4-block32,head=w8")
    assert budget_of(TASK, recipe) == BUDGET["w4-block32"]
    assert judge_similarity({}, parse_recipe("fp16")) is None


def test_a_reference_without_the_recipe_says_so(reference: Reference) -> None:
    with pytest.raises(ParityError, match="knows fp32, fp16, and w8 was built"):
        reference.structural(parse_recipe("w8"))


# --- outputs -------------------------------------------------------------------------------------


def of(**outputs: list[float]) -> Values:
    return Values({n: np.array(v, np.float32) for n, v in outputs.items()}, {})


def test_outputs_are_judged_by_the_tasks_budget() -> None:
    wanted = of(mrd1_mm=[4.0, 4.0], lf_mm=[10.0, 20.0], lf_std_mm=[0.5, 0.5])
    actual = of(mrd1_mm=[4.0, 4.03125], lf_mm=[10.0, 20.015625], lf_std_mm=[0.5, 0.5])
    judged = judge_outputs(actual, wanted, TASK, FP16)
    assert list(judged) == ["mrd1_mm", "lf_mm", "lf_std_mm"]
    # 1/32 and 1/64 mm, in four digits, where 0.02 are allowed.
    assert [o.max_error for o in judged.values()] == [0.03125, 0.01562, 0.0]
    assert [o.passed for o in judged.values()] == [False, True, True]
    # 10·log10(500 / 64⁻²) by hand.
    assert judged["lf_mm"].sqnr_db == 63.1
    assert {o.unit for o in judged.values()} == {"mm"}
    strict = judge_outputs(actual, wanted, TASK, parse_recipe("fp32"))
    assert [o.passed for o in strict.values()] == [False, False, True]
    assert {o.budget for o in strict.values()} == {BUDGET["fp32"]}


def test_the_budget_itself_is_allowed(monkeypatch) -> None:
    monkeypatch.setattr(type(TASK), "budgets", TASK.budgets._replace(float16=0.015625))
    wanted = of(lf_mm=[8.0])
    assert judge_outputs(of(lf_mm=[8.015625]), wanted, TASK, FP16)["lf_mm"].passed
    above = float(np.nextafter(np.float32(8.015625), np.float32(9)))
    assert not judge_outputs(of(lf_mm=[above]), wanted, TASK, FP16)["lf_mm"].passed


# --- LayerNorms ----------------------------------------------------------------------------------


def norms(*listed: tuple[str, float]) -> list[Norm]:
    """A star marks one that an earlier one was like."""
    return [Norm(layer.rstrip("*"), epsilon, layer.endswith("*")) for layer, epsilon in listed]


WANTED = norms(("a", 1e-6), ("b", 1e-6), ("c", 1e-5), ("head", 1e-4), ("head*", 1e-4))
E6, E5, E4 = 1e-6, 1e-5, 1e-4


@pytest.mark.parametrize(
    "epsilons",
    [
        [E6, E6, E5, E4, E4],
        [E6, E6, E5, E4],
        [E4, E6, E5, E4, E6],
        [E5, E4, E6, E6],
        [E6 * (1 + 6e-8), E6, float(np.float32(E5)), E4, E4],
        [E6 * (1 + 0.9 * EPSILON_TOLERANCE), E6, E5, E4, E4],
    ],
    ids=["same", "merged", "reordered", "merged-reordered", "float32", "in-tolerance"],
)
def test_norms_that_agree(epsilons: list[float]) -> None:
    assert compare_norms(epsilons, WANTED) == {}


@pytest.mark.parametrize(
    ("epsilons", "wrong"),
    [
        ([E6, 2e-6, E5, E4, E4], {"b": "LayerNorm has epsilon 2e-06 where 1e-06 is wanted"}),
        (
            [E6 * (1 + 1.2 * EPSILON_TOLERANCE), E6, E5, E4, E4],
            {"a": "LayerNorm has epsilon 1.001e-06 where 1e-06 is wanted"},
        ),
        # The first of a layer is named.
        ([E6, E6, E5, 1e-3, 2e-3], {"head": "LayerNorm has epsilon 0.001 where 0.0001 is wanted"}),
        # One that may be merged is none that may be wrong.
        ([E6, E6, E5, E4, 1e-3], {"head": "LayerNorm has epsilon 0.001 where 0.0001 is wanted"}),
        ([E6, E6, E5, E4, np.nan], {"head": "LayerNorm has epsilon nan where 0.0001 is wanted"}),
        ([0.0, E6, E5, E4, E4], {"a": "LayerNorm has epsilon 0 where 1e-06 is wanted"}),
        # One less than may be.
        ([E6, E6, E4], {"c": "no LayerNorm has its epsilon 1e-05"}),
        ([E6, E6, E5], {"head": "no LayerNorm has its epsilon 0.0001"}),
        ([E6, E6, 1e-3, E4], {"c": "no LayerNorm has its epsilon 1e-05"}),
        (
            [],
            {
                "a": "no LayerNorm has its epsilon 1e-06",
                "b": "no LayerNorm has its epsilon 1e-06",
                "c": "no LayerNorm has its epsilon 1e-05",
                "head": "no LayerNorm has its epsilon 0.0001",
            },
        ),
        # More than there are.
        (
            [E6, E6, E5, E4, E4, E6],
            {"head": "a LayerNorm more than in the reference, of epsilon 1e-06"},
        ),
        (
            [E6, E6, E5, E4, E4, 7.0],
            {"head": "a LayerNorm more than in the reference, of epsilon 7"},
        ),
    ],
    ids=[
        "one-off", "over-the-tolerance", "two-of-a-layer", "repeated-off", "nan", "zero",
        "one-less", "head-less", "less-and-off", "none", "one-more", "foreign-more",
    ],
)  # fmt: skip
def test_norms_that_do_not_agree(epsilons: list[float], wrong: dict[str, str]) -> None:
    assert compare_norms(epsilons, WANTED) == wrong


def test_two_layers_exchanged_cannot_be_told() -> None:
    """Documented: the order is free, so that only the set is certain."""
    assert compare_norms([E5, E6], norms(("a", E6), ("b", E5))) == {}


def test_a_merged_one_does_not_take_the_place_of_another() -> None:
    wanted = norms(("a", E5), ("b*", E5), ("c", E5))
    assert compare_norms([E5, E5], wanted) == {}
    assert compare_norms([E5], wanted) == {"c": "no LayerNorm has its epsilon 1e-05"}


def test_no_norms_at_all() -> None:
    assert compare_norms([], []) == {}
    assert compare_norms([E6], []) == {
        "head": "a LayerNorm more than in the reference, of epsilon 1e-06"
    }
