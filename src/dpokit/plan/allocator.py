"""What this process's own allocator takes for a sequence of tensors: it is asked for each, and nothing is written.

Memory that was never written to is not resident, so a step of many GiB is rehearsed for next to nothing. Unlike a sum
of bytes, the result holds the holes that an allocator keeps between blocks, under the very settings (MALLOC_*) that the
training process will inherit.
"""

import ctypes
import sys


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2` (malloc.h); `arena` is what was taken by brk, `hblkhd` what was mapped."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


class Block:
    """So many bytes, aligned to 64 as torch's CPU allocator aligns them (c10/core/alignment.h); freed with the object.

    Raises: MemoryError where the system grants no such address range.
    """

    def __init__(self, libc: ctypes.CDLL, size_bytes: int) -> None:
        self._free = libc.free
        self._start = ctypes.c_void_p()
        if libc.posix_memalign(ctypes.byref(self._start), ctypes.c_size_t(64), ctypes.c_size_t(size_bytes)):
            raise MemoryError

    def __del__(self) -> None:
        self._free(self._start)


class ShadowHeap:
    """Allocates and frees beside a trace; `peak_bytes` is the most the heap grew by."""

    def __init__(self, libc: ctypes.CDLL) -> None:
        self._libc = libc
        self._blocks: dict[int, Block] = {}
        self._before_bytes = self._size_bytes()
        self.peak_bytes = 0
        self.refused = False

    def _size_bytes(self) -> int:
        info = self._libc.mallinfo2()
        return int(info.arena) + int(info.hblkhd)

    def add(self, key: int, size_bytes: int) -> None:
        """A tensor's storage comes; where the system refuses so much, the rehearsal is given up (`refused`)."""
        if self.refused:
            return
        try:
            self._blocks[key] = Block(self._libc, size_bytes)
        except MemoryError:
            self.refused = True
            self._blocks.clear()
            return
        self.peak_bytes = max(self.peak_bytes, self._size_bytes() - self._before_bytes)

    def drop(self, key: int) -> None:
        """A tensor's storage goes."""
        self._blocks.pop(key, None)


def find_heap() -> ShadowHeap | None:
    """A heap to rehearse on; None where the C library is not glibc 2.33 or newer, whose heap can be asked its size."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallinfo2") and hasattr(libc, "posix_memalign")):
        return None
    libc.mallinfo2.restype = _Mallinfo2
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free.restype = None
    return ShadowHeap(libc)
