"""Memory that was freed is kept and used again.

glibc maps every large block anew and gives it back when it is freed, so that each step of training touches fresh pages, which the
kernel has to clear one by one: at 2 to 3 GB/s, slower than the products that are written there. Tensors of a step have the same
sizes in every step; kept, their pages are there already. The price is memory: blocks are cut out of one heap and leave gaps, so a
process holds more at its peak (a tenth in training on the model that ships, twice as much where [token, feature] tensors are made
anew many times a step).
"""

import ctypes
import platform

# Parameters of mallopt(3), from <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
TOP_PAD = 64 * 2**20  # bytes by which the heap grows at least
NEVER = 2**31 - 1  # bytes; free memory at the end of the heap beyond which some is given back


def retain_heap() -> bool:
    """Of this process, from now on; False, and nothing changes, where the allocator is not glibc's."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, NEVER), (_M_TOP_PAD, TOP_PAD)):
        assert mallopt(parameter, value) == 1, f"glibc refuses mallopt({parameter}, {value})"
    return True
