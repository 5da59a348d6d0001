"""Memory of a build: kept while a step runs, given back to the system between the steps.

Linux hands out pages one by one, which costs more than the arithmetic on them (a softmax over the
attention of a ViT-B at 518 took seven times as long); so what is freed is used again. Between steps
it goes back, or each step would hold what the largest one needed.
"""

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed() -> None:
    """Tell glibc to use freed blocks again, large ones too."""
    _ask_glibc("mallopt", _MMAP_MAX, 0)
    _ask_glibc("mallopt", _TRIM_THRESHOLD, _NEVER)


def release() -> None:
    """Collect what nothing refers to, and give it back."""
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
