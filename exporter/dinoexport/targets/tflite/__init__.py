"""TFLite, run by LiteRT (Android, browser, embedded Linux)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import final

from dinoexport.graph.capture import CapturedProgram
from dinoexport.memory import release
from dinoexport.targets.base import LowerOptions, Runtime, Target


@final
class TfliteTarget(Target):
    """Float32 arithmetic, but for linear layers whose recipe quantises their activations."""

    name = "tflite"
    suffix = ".tflite"
    supports = {  # noqa: RUF012
        "fp32": "everywhere",
        "fp16": "everywhere; weights are stored in half, arithmetic is float32 on CPUs",
        "w8": "everywhere; small, and as fast as fp32: weights are unpacked while it loads",
        "w8a8-dynamic": "CPUs: 0.40 of fp32's time (ViT-S at 224, one thread, host; 0.62 at 518)",
        "w8a8": "CPUs: 0.39 of fp32's time (ViT-S at 224, one thread, host; 0.61 at 518)",
        "w8a16": "CPUs, without XNNPACK: 23 times fp32's time; for comparison only",
        "w4-block32": "CPUs: 0.54 of fp32's time; linear layers round their inputs to 8 bits too",
    }

    def lower(
        self,
        program: CapturedProgram,
        path: Path,
        options: LowerOptions,
        metadata: Mapping[str, str],
    ) -> dict[str, str]:
        """Write a .tflite file."""
        from dinoexport.targets.tflite.lower import lower
        from dinoexport.targets.tflite.quantize import store_layers_
        from dinoexport.targets.tflite.taps import debug_file

        with debug_file(program) as debug:
            release(program.weight_bytes)
            graph = lower(program)
            release(program.weight_bytes)
            taps = debug.locate(graph)
        if program.recipe.name != "fp32":
            store_layers_(graph, program)
        graph.add_metadata(metadata)
        graph.save(path)
        return taps

    def runtime(
        self, path: Path, taps: Mapping[str, str] | None = None, *, exact: bool = False
    ) -> Runtime:
        """Open the file in LiteRT with XNNPACK kernels; taps become outputs."""
        from dinoexport.targets.tflite.runtime import TfliteRuntime

        return TfliteRuntime(path, taps or {}, exact=exact)

    def check_weights(self, size_bytes: int) -> None:
        """Refuse what passes the 2 GB of a flatbuffer."""
        from dinoexport.targets.tflite.graph import check_size

        check_size(size_bytes)

    def exact_runtimes(
        self, path: Path, taps: Mapping[str, str]
    ) -> Sequence[Callable[[], Runtime]]:
        """XNNPACK first: LiteRT's own kernels take six times as long. Its sums lose digits where a
        group norm reads few places (107 dB of 110 were seen), so those judge what it fails.
        """
        from dinoexport.targets.tflite.runtime import TfliteRuntime

        return (
            lambda: TfliteRuntime(path, taps, exact=True, own_kernels=False),
            lambda: TfliteRuntime(path, taps, exact=True),
        )

    def read_metadata(self, path: Path) -> dict[str, str]:
        """Return the model's metadata buffers."""
        from dinoexport.targets.tflite.runtime import read_metadata

        return read_metadata(path)

    def gelu_forms(self, path: Path) -> set[str]:
        """Read the ``approximate`` option of each GELU."""
        from dinoexport.targets.tflite.runtime import gelu_forms

        return gelu_forms(path)

    def norm_epsilons(self, path: Path) -> list[float]:
        """Read the constant that is added before each RSQRT."""
        from dinoexport.targets.tflite.runtime import norm_epsilons

        return norm_epsilons(path)

    def count_operations(self, path: Path) -> dict[str, int]:
        """Count operators."""
        from dinoexport.targets.tflite.runtime import TfliteRuntime

        return TfliteRuntime(path, {}).count_operations()
