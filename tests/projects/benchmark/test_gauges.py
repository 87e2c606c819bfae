import mmap

from benchmark_project import gauges


def test_peak_memory():
    peak = gauges.PeakMemory(gauges.CPU)
    before = gauges.memory("VmRSS")
    with mmap.mmap(-1, 100 << 20) as block:  # given back at once, unlike an allocator's
        block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)
    assert 90 << 20 < peak.growth() < 120 << 20
    assert gauges.memory("VmRSS") - before < 20 << 20
