"""Time and memory of this process, or of its GPU."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

CPU = torch.device("cpu")


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(function: Callable[[], object], repeats: int, device: torch.device = CPU) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = now(device)
        function()
        times.append(now(device) - start)
    return statistics.median(times)


class PeakMemory:
    """By how many bytes memory grows at most, from the making of this object on.

    That of the process on a CPU, of PyTorch's tensors on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            reset_peak_memory()
            self.before = memory("VmRSS")

    def growth(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return memory("VmHWM") - self.before


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
