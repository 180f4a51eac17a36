"""Host memory: how much there is, how much this process has used, and how the C library reuses it."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path


def host_memory_bytes() -> int:
    """This machine's memory, or the container's limit if that is lower."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or no limit ("max")
            pass
    return min(limits)


def peak_resident_bytes() -> int | None:
    """Peak resident memory of this process; None where the system does not report it."""
    try:
        # Not getrusage: its value includes the peak of the process that this one was forked from.
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) * 1024 if match else None
    except OSError:
        return None


def tune_malloc() -> None:
    """Let the C library reuse large blocks instead of returning them: fresh memory costs page faults in every step.

    glibc only. Call it after compiling, which would otherwise leave small blocks between the large ones.
    bench/README.md has the gains.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
