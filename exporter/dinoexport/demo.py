"""The main job on the embedded checkpoint, and a picture of what the artifact measured."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dinoexport.console import Reporter
from dinoexport.pipeline import BuiltBundle, build
from dinoexport.plan import BuildRequest
from dinoexport.predict import Prediction, predict_files
from dinotrain.tasks import get_task

DEMO_SEED = 11
DEMO_COUNT = 12


@dataclass(frozen=True)
class DemoResult:
    """The bundle, what it measured on a rendered sample, and the true values."""

    bundle: BuiltBundle
    prediction: Prediction
    true: dict[str, float]
    picture: Path


def run_demo(task_name: str, target: str, out: Path, reporter: Reporter) -> DemoResult:
    """Build one bundle, render a sample that it was not trained on, and measure it.

    Raises:
        DinoError: as ``build`` and ``predict_files``.
    """
    task = get_task(task_name)
    bundle = build(BuildRequest(task_name, target, out), reporter).bundles[0]
    with reporter.step("render a sample"):
        folder = out / f"demo-{task_name}"
        manifest = task.synthesise(DEMO_COUNT, DEMO_SEED, folder / "data")
        dataset = task.read(manifest, image_size=(448, 448))
        sample = dataset.split("test").samples[0]
        files = []
        for name, image in sample.images.items():
            file = folder / f"{name}.png"
            Image.fromarray(dataset.load(image)).save(file)
            files.append(f"{name}={file}")
    picture = out / f"demo-{task_name}.png"
    with reporter.step("measure it"):
        prediction = predict_files(bundle.path, files, picture=picture)
    true = task.expected(sample.values)
    return DemoResult(bundle, prediction, true, picture)
