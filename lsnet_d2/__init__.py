"""LSNet for Detectron2: boxes, contours and poses from anchor points with landmark vectors.

Importing this package registers the meta-architecture, the backbones and the data sets.
"""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "lsnet_d2 needs Detectron2, which pip cannot install by its name: run `make setup` in the "
        "checkout, or pip install --no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2'"
    ) from error

from .config import add_lsnet_config
from .data import builtin
from .exports import Results
from .modeling import LSNet
from .predictor import LSNetPredictor

__all__ = ["LSNet", "LSNetPredictor", "Results", "add_lsnet_config", "builtin"]
