from . import backbone
from .head import LSNetHead
from .landmarks import ExtremeBranch, LandmarkBranch, build_branches
from .lsnet import LSNet

__all__ = [
    "ExtremeBranch",
    "LSNet",
    "LSNetHead",
    "LandmarkBranch",
    "backbone",
    "build_branches",
]
