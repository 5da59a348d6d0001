"""Memory that is free goes back to the system between the steps of a build."""

import ctypes
import gc
import sys
from contextlib import suppress


def release() -> None:
    """Collect what nothing refers to, and give it back: glibc keeps freed weights for itself."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another libc keeps nothing, or cannot be asked
            ctypes.CDLL(None).malloc_trim(0)
