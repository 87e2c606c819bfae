"""LSNet for Detectron2: boxes with extreme points from anchor points with landmark vectors.

Importing this package registers the meta-architecture, the backbones and the ``shapes`` data set.
"""

from .config import add_lsnet_config
from .data import builtin  # registers the data set
from .modeling import LSNet

__all__ = ["LSNet", "add_lsnet_config", "builtin"]
