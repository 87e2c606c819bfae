from . import backbone
from .head import LSNetHead
from .landmarks import ExtremeBranch, LandmarkBranch, build_branches
from .lsnet import LSNet
from .test_time_augmentation import LSNetDatasetMapperTTA, LSNetWithTTA

__all__ = [
    "ExtremeBranch",
    "LSNet",
    "LSNetDatasetMapperTTA",
    "LSNetHead",
    "LSNetWithTTA",
    "LandmarkBranch",
    "backbone",
    "build_branches",
]
