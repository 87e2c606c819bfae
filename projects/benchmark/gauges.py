"""Time and memory of this process."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory(field: str) -> int:
    """Bytes of this process: now ("VmRSS"), or at most so far ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: the benchmark needs Linux")


def reset_peak_memory() -> None:
    """Let the peak start anew, at what is in use now."""
    # what the allocator keeps of freed memory would serve the next step uncounted
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
