"""Memory that a step gives back stays for the next one. glibc's doing; other C libraries have their own ways."""

import ctypes
import platform

# Of <malloc.h>, in bytes: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD. Two of the three alone change little.
_MALLOC_OPTIONS = {-3: 2**29, -1: 2**30, -2: 2**26}


def keep_memory() -> None:
    """Tells glibc to keep freed memory rather than to return it to the system, where each large buffer costs page faults anew.

    To be said again whenever a data set of a generator was made, as tf.distribute makes one for each iterator: TensorFlow 2.21
    then sets M_MMAP_THRESHOLD to 128 KiB, seen under Python 3.11 (`ApplyPython311MemoryPatch`), against a leak of
    `Dataset.from_generator` (https://github.com/tensorflow/tensorflow/issues/65675). By chance of what is free, a step of the
    article's network has 15,000 page faults from then on, which take 60 ms.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    for parameter, size in _MALLOC_OPTIONS.items():
        # An old glibc refuses the first one; the others without it would make things worse.
        if not ctypes.CDLL(None).mallopt(parameter, size):
            break
