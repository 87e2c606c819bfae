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
