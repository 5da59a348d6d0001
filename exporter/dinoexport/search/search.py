"""The search: sensitivity of each group, mixtures by simulation, artifacts by measurement."""

import copy
import dataclasses
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoexport.console import Reporter, quiet
from dinoexport.errors import BuildError
from dinoexport.graph.capture import capture_deploy
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.pipeline import (
    BuildPlan,
    embedded_metadata,
    load_model,
    make_deploy_model,
    read_pictures,
    tool_versions,
)
from dinoexport.quantize.calibration import Calibration
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.observers import get_observer
from dinoexport.quantize.pictures import HeldOut, read_held_out
from dinoexport.quantize.prepare import assign_layers, prepare_
from dinoexport.recipes import PRECISIONS, Precision, Recipe, parse_recipe
from dinoexport.search.front import Candidate, Preference, choose
from dinoexport.search.groups import group_layers, raise_groups
from dinoexport.search.proposals import finer, ladder, propose_mixture
from dinoexport.search.simulation import Simulation, run_model
from dinoexport.search.state import SearchState, load_state, save_state
from dinoexport.targets.base import LowerOptions, Runtime, Target
from dinoexport.targets.table import get_target
from dinoexport.verify.reference import Reference, make_reference
from dinotrain.digests import digest
from dinotrain.errors import DinoError, UsageError
from dinotrain.tasks import get_task

SIMULATED_SAMPLES = 12
"""Of the calibration pictures, that simulations run on."""
TIMED_RUNS = 7
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
        refused: {recipe: why it was not}.
        judged_on: what errors were measured on, in a few words.
    """

    target: str
    chosen: Candidate | None
    candidates: tuple[Candidate, ...]
    refused: dict[str, str]
    judged_on: str


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
        self.plan = dataclasses.replace(plan, recipe=parse_recipe("fp16"))
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
        self.simulation = Simulation(
            self._make, self.calibration, pictures.samples[:SIMULATED_SAMPLES]
        )
        with reporter.step(f"run float32 on {len(self.held_out.samples)} held-out samples"):
            self.expected, _ = run_model(self._deploy, self.held_out.samples)

    def run(self, name: str) -> SearchResult:
        """Search one target; what an earlier run has measured is taken from its state."""
        target = get_target(name)
        path = self.plan.request.out / f".search-{self._stem}-{name}.json"
        state = load_state(path, self._key(target))

        def keep() -> None:
            save_state(path, state)

        for recipe in self._propose(target, state, keep):
            if recipe.name in state.candidates or recipe.name in state.refused:
                continue
            try:
                state.candidates[recipe.name] = self._measure(target, recipe)
            except DinoError as error:
                state.refused[recipe.name] = str(error)
            keep()
        found = tuple(state.candidates.values())
        return SearchResult(
            target=name,
            chosen=choose(found, self.request.budget, self.request.prefer),
            candidates=found,
            refused=dict(state.refused),
            judged_on=f"{len(self.held_out.samples)} held-out samples ({self.held_out.source})",
        )

    @property
    def _stem(self) -> str:
        return self.plan.name.removesuffix(f"-{self.plan.recipe.name}")

    def _make(self) -> DeployModel:
        return copy.deepcopy(self._deploy)

    def _key(self, target: Target) -> str:
        """Digest of all that measurements depend on."""
        facts = (
            self.sha256,
            self.plan.config.image_size,
            self.plan.request.layout,
            self.plan.request.minimum_ios,
            target.name,
            self.calibration.pictures.sha256,
            self.calibration.observer.name,
            self.held_out.sha256,
            sorted(tool_versions().items()),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _propose(
        self, target: Target, state: SearchState, keep: Callable[[], None]
    ) -> Iterator[Recipe]:
        """Recipes to build: fp16, each precision alone, and the mixture of each that may hold."""
        supported = list(target.supports)
        yield parse_recipe("fp16")
        for base in ladder(supported):
            if not self._applies(base):
                continue
            yield Recipe(base)
            raised = finer(base, supported)
            noise = self._sensitivity(base, state, keep)

            def drop_of(recipe: Recipe) -> float:
                if recipe.name not in state.drops:
                    state.drops[recipe.name] = self._simulate(recipe)
                    keep()
                return state.drops[recipe.name]

            with self.reporter.step(f"{target.name}: mixtures of {base.name} and {raised.name}"):
                mixture = propose_mixture(base, raised, noise, self.request.budget, drop_of)
            if mixture is not None:
                yield mixture

    def _simulate(self, recipe: Recipe) -> float:
        """Drop of a recipe on calibration pictures; beyond all budgets where it cannot be built."""
        try:
            outputs, _ = self.simulation.run(recipe)
        except BuildError:
            # With most groups raised, no layer may be left whose activations are quantised.
            return IMPOSSIBLE
        return self.task.drop(self.simulation.expected, outputs)

    def _applies(self, base: Precision) -> bool:
        try:
            assign_layers(self._deploy, Recipe(base))
        except BuildError:
            return False
        return True

    def _sensitivity(
        self, base: Precision, state: SearchState, keep: Callable[[], None]
    ) -> dict[str, float]:
        """Noise with one group at ``base`` and all others in float32.

        Groups that ``base`` leaves with float activations are not among those that can be raised to
        them.
        """
        assigned = assign_layers(self._deploy, Recipe(base))
        groups = list(group_layers(name for name, given in assigned.items() if given is base))
        known = state.noise.setdefault(base.name, {})
        missing = [group for group in groups if group not in known]
        with self.reporter.step(f"sensitivity at {base.name}") as step:
            for done, group in enumerate(missing, start=1):
                recipe = raise_groups(PRECISIONS["fp32"], [group], base)
                known[group] = self.simulation.run(recipe)[1]
                keep()
                step.update(done, len(missing))
        return known

    def _measure(self, target: Target, recipe: Recipe) -> Candidate:
        """Build an artifact in a temporary folder and run it on the held-out pictures."""
        plan = dataclasses.replace(self.plan, recipe=recipe)
        with (
            tempfile.TemporaryDirectory(prefix="dinoexport-") as folder,
            self.reporter.step(f"{target.name}: build and run {recipe.name}") as step,
            quiet(self.log),
        ):
            target.check(recipe)
            deploy = self._make()
            layers = prepare_(deploy, recipe, self.calibration)
            program = capture_deploy(deploy, recipe, layers)
            path = Path(folder) / f"model{target.suffix}"
            options = LowerOptions(plan.request.minimum_ios)
            target.lower(program, path, options, embedded_metadata(plan, self.sha256))
            runtime = target.runtime(path)
            outputs = self._run(runtime, step.update)
            return Candidate(
                recipe=recipe.name,
                size_bytes=_size_of(path),
                error=self.task.drop(self.expected, outputs, self.held_out.true),
                latency_ms=self._time(runtime) if target.timed_here else None,
            )

    def _run(self, runtime: Runtime, progress: Callable[[int, int], None]) -> dict[str, np.ndarray]:
        outputs: dict[str, list[np.ndarray]] = {}
        for done, sample in enumerate(self.held_out.samples, start=1):
            for name, value in runtime.run(sample).outputs.items():
                outputs.setdefault(name, []).append(value[0] if len(value) == 1 else value)
            progress(done, len(self.held_out.samples))
        return {name: np.stack(values) for name, values in outputs.items()}

    def _time(self, runtime: Runtime) -> float:
        sample = self.held_out.samples[0]
        times = []
        for _ in range(TIMED_RUNS):
            start = time.perf_counter()
            runtime.run(sample)
            times.append(1e3 * (time.perf_counter() - start))
        return round(statistics.median(times), 3)


def _check_preference(plan: BuildPlan, request: SearchRequest) -> None:
    """Refuse what cannot be timed before anything is loaded."""
    if request.prefer != "speed":
        return
    for name in plan.targets:
        if not get_target(name).timed_here:
            raise UsageError(
                f"--prefer speed: this machine cannot time {name} artifacts. Use --prefer size."
            )


def _size_of(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)
