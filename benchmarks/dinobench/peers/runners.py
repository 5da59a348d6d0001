"""Run one artifact on one thread: a loaded model that answers prepared pixels.

All three runtimes get the same chance: one thread, buffers set up beforehand where the interface
allows it, and the answer read back within what is timed.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from statistics import median
from typing import Any, final

import numpy as np

from dinobench.peers.candidates import Candidate

MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)


def prepare(image: np.ndarray, candidate: Candidate) -> np.ndarray:
    """Return what a candidate reads.

    Normalising is never timed, which favours the peers: ours does it inside the model.

    Args:
        image: (S, S, 3) uint8 RGB.
        candidate: names its kind of pixels.

    Returns:
        (1, S, S, 3) uint8 or (1, 3, S, S) float32.
    """
    if candidate.pixels == "uint8":
        return image[np.newaxis]
    scaled = (image.astype(np.float32) / 255 - MEAN) / STD
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[np.newaxis], np.float32)


class Runner(ABC):
    """A loaded artifact."""

    @abstractmethod
    def run(self, pixels: np.ndarray) -> np.ndarray:
        """Prepared pixels → its first output, copied out."""


def open_runner(candidate: Candidate, folder: Path) -> Runner:
    """Load a candidate's artifact on one thread."""
    return RUNNERS[candidate.runtime](folder / candidate.file)


@final
class OnnxRunner(Runner):
    """onnxruntime, all its graph optimisations.

    Args:
        path: .onnx.
        profile: where to write a profile of every operation, see ``profile``.
    """

    def __init__(self, path: Path, profile: Path | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._input = self.session.get_inputs()[0].name

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """See Runner.run."""
        return np.asarray(self.session.run(None, {self._input: pixels})[0])


@final
class LitertRunner(Runner):
    """LiteRT's interpreter with XNNPACK."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=str(path), num_threads=1)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """See Runner.run."""
        self._interpreter.set_tensor(self._input, pixels)
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._output)


@final
class OpenvinoRunner(Runner):
    """OpenVINO's CPU plugin: one stream, one thread, float32 where the file says float32.

    Its own default on this kind of processor is bfloat16, which is no float32 result.
    """

    def __init__(self, path: Path, *, profile: bool = False) -> None:
        import openvino  # pyright: ignore[reportMissingImports]

        core: Any = openvino.Core()
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": "1",
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERF_COUNT": profile,
        }
        self._request = core.compile_model(str(path), "CPU", options).create_infer_request()

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """See Runner.run."""
        found = self._request.infer([pixels], share_inputs=True)
        return np.array(next(iter(found.values())))

    def profiled(self, pixels: np.ndarray, runs: int) -> list[tuple[str, float]]:
        """Per operation its kind and its median time in ms; needs ``profile``."""
        kinds: dict[str, str] = {}
        times: dict[str, list[float]] = {}
        for _ in range(runs):
            self.run(pixels)
            for entry in self._request.profiling_info:
                kinds[entry.node_name] = entry.node_type
                times.setdefault(entry.node_name, []).append(entry.real_time.total_seconds() * 1e3)
        return [(kinds[name], median(values)) for name, values in times.items()]


RUNNERS: dict[str, type] = {
    "onnxruntime": OnnxRunner,
    "litert": LitertRunner,
    "openvino": OpenvinoRunner,
}
