"""What figures were taken on: processor, memory and versions, without a date or a host name."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

PACKAGES = (
    "dinoexport",
    "torch",
    "onnx",
    "onnxruntime",
    "coremltools",
    "litert-torch",
    "ai-edge-litert",
)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine, as far as its figures depend on it."""

    processor: str
    cores: int
    """That this process may use."""
    memory_gb: float
    system: str
    python: str
    versions: dict[str, str]


def describe_machine() -> Machine:
    """Describe this machine; nothing heavy is imported for it."""
    return Machine(
        processor=_processor(),
        cores=_cores(),
        memory_gb=round(_memory_bytes() / 1e9, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
    )


def busy_note() -> str:
    """Return why timings taken now are too long, or nothing."""
    load = os.getloadavg()[0]
    # Below this, what else runs takes less than a tenth of the machine.
    if load < 0.1 * _cores() + 0.1:
        return ""
    return f"other work is running (load {load:.1f} on {_cores()} cores): times come out too long"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
