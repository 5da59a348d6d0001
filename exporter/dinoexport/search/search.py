"""The search: sensitivity of each group, mixtures by simulation, artifacts by measurement."""

import copy
import dataclasses
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from dinoexport.bundle import artifact_digest
from dinoexport.console import Reporter, quiet
from dinoexport.errors import BuildError
from dinoexport.facts import embedded_metadata, tool_versions
from dinoexport.graph.capture import CapturedProgram, capture_deploy, recapture_
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.pipeline import load_model, lowering, make_deploy_model, read_pictures
from dinoexport.plan import BuildPlan, plan_build
from dinoexport.quantize.calibration import Calibration
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.observers import get_observer
from dinoexport.quantize.pictures import HeldOut, read_held_out
from dinoexport.quantize.prepare import Known, assign_layers, prepare_
from dinoexport.recipes import PRECISIONS, Precision, Recipe, parse_recipe
from dinoexport.search.front import Candidate, Preference, choose
from dinoexport.search.groups import group_layers, raise_groups
from dinoexport.search.proposals import SHARE, finer, ladder, propose_mixture
from dinoexport.search.simulation import Simulation, run_model
from dinoexport.search.sizes import group_sizes, weight_bytes
from dinoexport.search.state import Measured, load_state, save_state
from dinoexport.targets.base import Runtime, Target, artifact_bytes
from dinoexport.targets.table import get_target
from dinoexport.verify.reference import Reference, make_reference
from dinotrain.digests import digest
from dinotrain.errors import DinoError, UsageError
from dinotrain.tasks import get_task

SIMULATED_IMAGES = 36
"""Of the calibration pictures, that simulations run on; a sample of an eyelid has three."""
MIXTURES = 3
"""Of one precision, that are built at most until one holds the budget."""
TIMED_RUNS = 7
CLOSE = 1.5
"""Times the least latency: what was timed on its own, minutes apart, may be the other way round."""
IMPOSSIBLE = 1e30
"""JSON has no infinity."""


@dataclass(frozen=True)
class SearchRequest:
    """What ``--precision auto`` asks for.

    Attributes:
        budget: largest ``Task.drop`` on held-out pictures.
        prefer: what is least among the artifacts that hold it.
        held_out: samples to judge them on.
    """

    budget: float
    prefer: Preference = "size"
    held_out: int = 32


@dataclass(frozen=True)
class SearchResult:
    """What a search of one target found.

    Attributes:
        target: its name.
        chosen: what is shipped; None if nothing holds the budget.
        candidates: all that were measured.
        refused: {recipe: why it cannot be built}.
        skipped: {recipe: why it was not built}: what is larger and no more exact than what holds.
        held_out: what errors were measured on.
    """

    target: str
    chosen: Candidate | None
    candidates: tuple[Candidate, ...]
    refused: dict[str, str]
    skipped: dict[str, str]
    held_out: HeldOut

    @property
    def judged_on(self) -> str:
        """What errors were measured on, in a few words."""
        return f"{len(self.held_out.samples)} held-out samples ({self.held_out.source})"


class Search:
    """The search for one checkpoint, which its targets share.

    Args:
        plan: of a build at any precision; its recipe does not matter.
        request: budget and preference.
        reporter: told of each step.
        log: receives what converters say.

    Raises:
        UsageError: fast is asked for and this machine cannot run a target's artifacts.
    """

    def __init__(
        self, plan: BuildPlan, request: SearchRequest, reporter: Reporter, log: Path
    ) -> None:
        _check_preference(plan, request)
        self.plan = plan_build(dataclasses.replace(plan.request, precision="fp16"))
        self.request = request
        self.reporter = reporter
        self.log = log
        self.task = get_task(plan.config.task)
        with reporter.step(f"load {plan.checkpoint.name}"):
            model = load_model(plan)
            self.sha256 = digest(plan.checkpoint)
        with reporter.step("reference (PyTorch float32)"):
            self.reference: Reference = make_reference(model, self.sha256)
            self._deploy = make_deploy_model(model, self.plan, self.reference)
        pictures = read_pictures(plan, self.reference)
        self.held_out: HeldOut = read_held_out(
            self.task,
            plan.config.image_size,
            pictures,
            plan.request.calibration.path,
            count=request.held_out,
        )
        with reporter.step(f"calibrate on {pictures.source}") as step:
            observer = get_observer(plan.request.calibration.observer)
            self.calibration: Calibration = calibrate(self._make(), pictures, observer, step.update)
        self._known: Known = {}
        count = SIMULATED_IMAGES // len(self.task.inputs)
        self.simulation = Simulation(
            self._make, self.calibration, pictures.samples[:count], self._known
        )
        with reporter.step(f"run float32 on {len(self.held_out.samples)} held-out samples"):
            self.expected, _ = run_model(self._deploy, self.held_out.samples)
        self._program: CapturedProgram | None = None
        self._path = plan.request.out / f".search-{self.plan.stem}.json"
        self._state = load_state(self._path, self._key())

    def run(self, name: str) -> SearchResult:
        """Search one target; what an earlier run has measured is taken from its state."""
        target = get_target(name)
        measured = self._state.targets.setdefault(name, Measured())
        skipped: dict[str, str] = {}
        for recipe in self._propose(target, measured, skipped):
            if recipe.name in measured.candidates or recipe.name in measured.refused:
                continue
            try:
                measured.candidates[recipe.name] = self._measure(target, recipe)
            except DinoError as error:
                measured.refused[recipe.name] = str(error)
            self._keep()
        if self.request.prefer == "speed":
            self._time_in_turns(target, measured)
        found = tuple(measured.candidates.values())
        return SearchResult(
            target=name,
            chosen=choose(found, self.request.budget, self.request.prefer),
            candidates=found,
            refused=dict(measured.refused),
            skipped=skipped,
            held_out=self.held_out,
        )

    def _keep(self) -> None:
        save_state(self._path, self._state)

    def _make(self) -> DeployModel:
        return copy.deepcopy(self._deploy)

    def _key(self) -> str:
        """Digest of all that measurements depend on."""
        facts = (
            self.sha256,
            self.plan.config.image_size,
            self.plan.request.layout,
            self.plan.request.minimum_ios,
            self.calibration.pictures.sha256,
            self.calibration.observer.label,
            self.held_out.sha256,
            sorted(tool_versions().items()),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _propose(
        self, target: Target, measured: Measured, skipped: dict[str, str]
    ) -> Iterator[Recipe]:
        """Recipes to build: fp16, each precision alone, and the mixture of each that may hold.

        Where the smallest is asked for, what is larger than one that holds comes only if it is more
        exact, and mixtures of it do not come at all.
        """
        supported = list(target.supports)
        float_half = parse_recipe("fp16")
        yield float_half
        for base in ladder(supported):
            if not self._applies(base):
                continue
            self._known.clear()
            alone = Recipe(base)
            smaller = self._smaller(alone, measured)
            built = alone.name in measured.candidates
            if smaller is None or built or self._more_exact(alone, smaller):
                yield alone
            else:
                skipped[alone.name] = f"larger and no more exact than {smaller.recipe}"
            if smaller is None and not self._holds(alone, measured):
                yield from self._mixtures(base, finer(base, supported), target, measured)

    def _mixtures(
        self, base: Precision, raised: Precision, target: Target, measured: Measured
    ) -> Iterator[Recipe]:
        """The mixture that may hold; where its artifact does not, a more careful one."""
        noise = self._sensitivity(base)
        sizes = group_sizes(self._deploy, noise)
        worth = {group: noise[group] / sizes[group] for group in noise}
        limit, least = SHARE * self.request.budget, 0
        for _ in range(MIXTURES):
            with self.reporter.step(f"{target.name}: mixtures of {base.name} and {raised.name}"):
                mixture = propose_mixture(base, raised, worth, limit, self._drop, least)
            if mixture is None or self._smaller(mixture, measured) is not None:
                return
            yield mixture
            if mixture.name in measured.refused or self._holds(mixture, measured):
                return
            error = measured.candidates[mixture.name].error
            limit = SHARE * self._drop(mixture) * self.request.budget / error
            # Simulation may have seen no loss at all: some more are raised whatever it says.
            count = sum(given is raised for given in mixture.assign(worth).values())
            least = count + 1 + (len(worth) - count) // 4

    def _smaller(self, recipe: Recipe, measured: Measured) -> Candidate | None:
        """Return the most exact artifact that holds the budget and is smaller than a recipe's.

        None where speed is asked for, of which nothing is known before an artifact is timed.
        """
        if self.request.prefer == "speed":
            return None
        known = measured.candidates.get(recipe.name)
        size = self._size(recipe, measured) if known is None else known.size_bytes
        budget = self.request.budget
        smaller = [
            c
            for c in measured.candidates.values()
            if c.error <= budget and c.size_bytes < size and c.recipe != recipe.name
        ]
        return min(smaller, key=lambda c: self._drop(parse_recipe(c.recipe)), default=None)

    def _more_exact(self, recipe: Recipe, other: Candidate) -> bool:
        """Compare simulation with simulation: labels come into what is measured alone."""
        return self._drop(recipe) < self._drop(parse_recipe(other.recipe))

    def _size(self, recipe: Recipe, measured: Measured) -> float:
        """Predict the size of an artifact from that of fp16's, in bytes."""
        half = measured.candidates.get("fp16")
        if half is None:
            return 0
        saved = weight_bytes(self._deploy, parse_recipe("fp16")) - weight_bytes(
            self._deploy, recipe
        )
        return half.size_bytes - saved

    def _holds(self, recipe: Recipe, measured: Measured) -> bool:
        known = measured.candidates.get(recipe.name)
        return known is not None and known.error <= self.request.budget

    def _drop(self, recipe: Recipe) -> float:
        """Drop of a recipe on calibration pictures; beyond all budgets where it cannot be built."""
        if recipe.name not in self._state.drops:
            try:
                drop = self.task.drop(self.simulation.expected, self.simulation.run(recipe))
            except BuildError:
                # With most groups raised, no layer may be left whose activations are quantised.
                drop = IMPOSSIBLE
            self._state.drops[recipe.name] = drop
            self._keep()
        return self._state.drops[recipe.name]

    def _applies(self, base: Precision) -> bool:
        try:
            assign_layers(self._deploy, Recipe(base))
        except BuildError:
            return False
        return True

    def _sensitivity(self, base: Precision) -> dict[str, float]:
        """Noise with one group at ``base`` and all others in float32.

        Groups that ``base`` leaves with float activations are not among those that can be raised to
        them.
        """
        assigned = assign_layers(self._deploy, Recipe(base))
        groups = list(group_layers(name for name, given in assigned.items() if given is base))
        known = self._state.noise.setdefault(base.name, {})
        missing = [group for group in groups if group not in known]
        if not missing:
            return known
        with self.reporter.step(f"sensitivity at {base.name}") as step:
            for done, group in enumerate(missing, start=1):
                recipe = raise_groups(PRECISIONS["fp32"], [group], base)
                known[group] = self.simulation.noise(recipe)
                self._keep()
                step.update(done, len(missing))
        return known

    def _capture(self, recipe: Recipe) -> CapturedProgram:
        """Capture the model once, and change its weights for each recipe."""
        deploy = self._make()
        layers = prepare_(deploy, recipe, self.calibration, self._known)
        if self._program is None:
            # Nobody looks at the taps of what is only measured.
            self._program = dataclasses.replace(
                capture_deploy(deploy, recipe, layers), tap_nodes={}
            )
            return self._program
        return recapture_(self._program, deploy, recipe, layers)

    def _measure(self, target: Target, recipe: Recipe) -> Candidate:
        """Build an artifact in a temporary folder and run it on the held-out pictures."""
        with (
            tempfile.TemporaryDirectory(prefix="dinoexport-") as folder,
            self.reporter.step(f"{target.name}: build and run {recipe.name}") as step,
            quiet(self.log),
        ):
            path = self._lower(target, recipe, Path(folder))
            runtime = target.runtime(path)
            outputs = self._run(runtime, step.update)
            return Candidate(
                recipe=recipe.name,
                size_bytes=artifact_bytes(path),
                sha256=artifact_digest(path),
                error=self.task.drop(self.expected, outputs, self.held_out.true),
                latency_ms=self._time([runtime])[0] if target.timed_here else None,
            )

    def _lower(self, target: Target, recipe: Recipe, folder: Path) -> Path:
        """Write the artifact of a recipe into a folder."""
        # As a build by that name would be planned: the plan is part of the artifact's bytes.
        request = dataclasses.replace(self.plan.request, precision=recipe.name, target=target.name)
        plan = plan_build(request)
        path = folder / f"{plan.name}{target.suffix}"
        options = plan.request.lower_options
        with lowering(target.name, self.log):
            metadata = embedded_metadata(plan, self.sha256)
            target.lower(self._capture(recipe), path, options, metadata)
        return path

    def _time_in_turns(self, target: Target, measured: Measured) -> None:
        """Build those that may be the fastest within the budget again, and time them side by side.

        Before, each was timed when it was built, and a host's speed drifts.
        """
        held = [c for c in measured.candidates.values() if c.error <= self.request.budget]
        least = min((c.latency_ms or 0.0 for c in held), default=0.0)
        close = [c for c in held if (c.latency_ms or 0.0) <= CLOSE * least]
        names = sorted(c.recipe for c in close)
        if len(close) < 2 or set(names) <= set(measured.timed_in_turns):
            return
        with (
            tempfile.TemporaryDirectory(prefix="dinoexport-") as folder,
            self.reporter.step(f"{target.name}: time {len(close)} artifacts in turns"),
            quiet(self.log),
        ):
            recipes = [parse_recipe(c.recipe) for c in close]
            paths = [self._lower(target, recipe, Path(folder)) for recipe in recipes]
            times = self._time([target.runtime(path) for path in paths])
        for candidate, latency_ms in zip(close, times, strict=True):
            timed = msgspec.structs.replace(candidate, latency_ms=latency_ms)
            measured.candidates[candidate.recipe] = timed
        measured.timed_in_turns = names
        self._keep()

    def _run(self, runtime: Runtime, progress: Callable[[int, int], None]) -> dict[str, np.ndarray]:
        outputs: dict[str, list[np.ndarray]] = {}
        for done, sample in enumerate(self.held_out.samples, start=1):
            for name, value in runtime.run(sample).outputs.items():
                outputs.setdefault(name, []).append(value[0] if len(value) == 1 else value)
            progress(done, len(self.held_out.samples))
        return {name: np.stack(values) for name, values in outputs.items()}

    def _time(self, runtimes: Sequence[Runtime]) -> list[float]:
        """Return the median latency of each in ms, run in turns after a first time."""
        sample = self.held_out.samples[0]
        times: list[list[float]] = [[] for _ in runtimes]
        for turn in range(TIMED_RUNS + 1):
            for runtime, taken in zip(runtimes, times, strict=True):
                start = time.perf_counter()
                runtime.run(sample)
                if turn:
                    taken.append(1e3 * (time.perf_counter() - start))
        return [round(statistics.median(taken), 3) for taken in times]


def _check_preference(plan: BuildPlan, request: SearchRequest) -> None:
    """Refuse what cannot be timed before anything is loaded."""
    if request.prefer != "speed":
        return
    for name in plan.targets:
        if not get_target(name).timed_here:
            raise UsageError(
                f"--prefer speed: this machine cannot time {name} artifacts. Use --prefer size."
            )
