import signal
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# Helpers shared by tests are imported by their file names.
sys.path.insert(0, str(Path(__file__).parent))

from parity import Parity
from parity_report import ParityReport

# The same examples in every run; a slow shared machine is no failure.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci")

# A shell that runs the tests in the background lets them ignore Ctrl-C, and the tools they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The models are tiny; threads would only wait for one another.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--parity-report",
        action="store_true",
        help="run all comparisons with the released code and tabulate them in docs/parity.md",
    )
    parser.addoption(
        "--device",
        default="cpu",
        help="on which the tests run that compare whole models; some others need 'cuda'",
    )


def pytest_configure(config):
    if config.getoption("--parity-report"):
        if getattr(config.option, "numprocesses", None):
            raise pytest.UsageError("--parity-report needs one process: add -n 0")
        page = config.rootpath / "docs" / "parity.md"
        config.pluginmanager.register(ParityReport(page), "parity-report")


@pytest.fixture(scope="session")
def device(request):
    """On which whole models are compared."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda":
        # Convolutions with ten bits of mantissa, the default, are no test of parity.
        torch.backends.cudnn.allow_tf32 = False
    return device


@pytest.fixture
def parity(request):
    """Comparisons with the released code, in the report if there is one."""
    report = request.config.pluginmanager.get_plugin("parity-report")
    findings = report.findings if report else []
    file, line, _ = request.node.location
    return Parity(findings.append, Path(file).as_posix(), line)
