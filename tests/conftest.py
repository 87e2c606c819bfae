import sys
from pathlib import Path

import hypothesis
import torch

# Helpers shared by tests are imported by their file names.
sys.path.insert(0, str(Path(__file__).parent))

# The same examples in every run; a slow shared machine is no failure.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci")

# The models are tiny; threads would only wait for one another.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--parity-report",
        type=Path,
        metavar="PAGE.md",
        help="write the largest differences from the released code into the page",
    )


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    page = config.option.parity_report
    if page is None:
        return
    if exitstatus != 0 or config.option.keyword or config.option.markexpr:
        terminalreporter.write_line(f"{page} is left: it takes all tests, and that all pass")
        return
    from parity import write_report

    write_report(page)
