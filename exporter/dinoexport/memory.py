"""Memory of a build: what each step leaves goes back to the system before the next one.

Within a step, blocks above 32 MB are mappings of their own, as glibc has it. Kept in its heap they
would spare a third of the time of large attention maps, in page faults; but what is small and lies
between them makes holes that no later map fits into: 14 GB were seen where 4 are enough.
"""

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

WORTH_BYTES = 16 * 2**20
"""Weights from which on a collection pays: beside all that converters load it takes 0.3 s."""


def release(size_bytes: int) -> None:
    """Collect what nothing refers to, and give it back: glibc keeps freed weights for itself.

    Args:
        size_bytes: of the weights that may be held in vain; nothing is done for few.
    """
    if size_bytes < WORTH_BYTES:
        return
    gc.collect()
    _ask_glibc("malloc_trim", 0)


def free_bytes() -> int | None:
    """Return what the system could still give, swap included; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        facts = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
        return 1024 * (facts["MemAvailable"] + facts["SwapFree"])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _ask_glibc(function: str, *arguments: int) -> None:
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # other libraries have no such function
            getattr(ctypes.CDLL(None), function)(*arguments)
