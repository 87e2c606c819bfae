import mmap

from benchmark_project import gauges


def test_peak_memory():
    gauges.reset_peak_memory()
    before = gauges.memory("VmRSS")
    with mmap.mmap(-1, 100 << 20) as block:  # given back at once, unlike an allocator's
        block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)
    assert 90 << 20 < gauges.memory("VmHWM") - before < 120 << 20
    assert gauges.memory("VmRSS") - before < 20 << 20
