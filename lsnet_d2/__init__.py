"""LSNet for Detectron2: boxes with extreme points from anchor points with landmark vectors.

Importing this package registers the meta-architecture, the backbones and the ``shapes`` data set.
"""

from .config import add_lsnet_config

__all__ = ["add_lsnet_config"]
