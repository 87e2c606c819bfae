from . import backbone
from .branches import ExtremeBranch, build_branches
from .fcos import FCOS
from .head import LSNetHead
from .landmarks import LandmarkBranch
from .lsnet import LSNet
from .test_time_augmentation import LSNetDatasetMapperTTA, LSNetWithTTA

__all__ = [
    "FCOS",
    "ExtremeBranch",
    "LSNet",
    "LSNetDatasetMapperTTA",
    "LSNetHead",
    "LSNetWithTTA",
    "LandmarkBranch",
    "backbone",
    "build_branches",
]
