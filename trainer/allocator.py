"""Memory that a step gives back stays for the next one. glibc's doing; other C libraries have their own ways."""

import ctypes
import platform

# Of <malloc.h>, in bytes. Two of the three alone change little.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD = -3, -1, -2
# The second is the most that an older glibc takes,
# DEFAULT_MMAP_THRESHOLD_MAX of https://man7.org/linux/man-pages/man3/mallopt.3.html.
# It is as good where no buffer is larger, as in the article's network with 256 images: 26 MB.
_MMAP_THRESHOLDS = (2**29, 2**25)


def keep_memory() -> None:
    """Tells glibc to keep freed memory rather than to return it to the system, where each large buffer costs page faults anew.

    To be said again whenever a data set of a generator was made, as tf.distribute makes one for each iterator: TensorFlow 2.21
    then sets M_MMAP_THRESHOLD to 128 KiB, seen under Python 3.11 (`ApplyPython311MemoryPatch`), against a leak of
    `Dataset.from_generator` (https://github.com/tensorflow/tensorflow/issues/65675). By chance of what is free, a step of the
    article's network has 15,000 page faults from then on, which take 60 ms.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # The others without it would make things worse.
    if any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_THRESHOLDS):
        mallopt(_M_TRIM_THRESHOLD, 2**30)
        mallopt(_M_TOP_PAD, 2**26)
