"""What a step gives back is kept for the next one, whatever TensorFlow has told the allocator in the meantime."""

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import mirrored

from trainer import pipeline
from trainer.allocator import keep_memory
from trainer.dataset import Examples

_M_MMAP_THRESHOLD, _BYTES, _OLD_MOST = -3, 400 * 2**20, 32 * 2**20
# Of the size that stands before a block: https://sourceware.org/glibc/wiki/MallocInternals
_IS_MMAPPED = 2


def _is_mapped(size: int = _BYTES) -> bool:
    """Whether a large block comes from the system, which takes it back when it is freed, and not from the heap."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes, library.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    block = library.malloc(size)
    assert block
    try:
        return bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & _IS_MMAPPED)
    finally:
        library.free(block)


@pytest.fixture(autouse=True)
def _returned_at_first() -> Iterator[None]:
    # What an earlier test has left in the heap would do for the block.
    ctypes.CDLL(None).malloc_trim(0)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**17)
    assert _is_mapped()
    yield
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**17)


def test_large_blocks_stay_in_the_heap() -> None:
    keep_memory()
    assert not _is_mapped()


def test_smaller_ones_do_where_an_older_glibc_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ctypes.CDLL(None)

    def mallopt(parameter: int, size: int) -> int:
        return 0 if parameter == _M_MMAP_THRESHOLD and size > _OLD_MOST else real.mallopt(parameter, size)

    with monkeypatch.context() as patched:
        patched.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
        keep_memory()
    assert not _is_mapped(26 * 10**6)
    assert _is_mapped()


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_they_do_after_tf_distribute_has_made_an_iterator(num_replicas: int) -> None:
    """TensorFlow 2.21 gives them back from then on: `ApplyPython311MemoryPatch`."""
    examples = Examples(np.zeros([16, 4, 4, 1], np.uint8), np.zeros([16], np.int32))
    iterator = pipeline.iterator_of(pipeline.eval_dataset_fn(examples, 4), mirrored(num_replicas))
    assert not _is_mapped()
    next(iterator)
    assert not _is_mapped()
