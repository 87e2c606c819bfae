from .batch_norm import FixedBatchNorm2d, conv_norm
from .corner_pooling import corner_pool
from .deform_conv import ModulatedDeformConv, sampled_conv
from .point_sampling import PointSampler
from .pyramid_sampling import PyramidDeformConv, PyramidGrid

__all__ = [
    "FixedBatchNorm2d",
    "ModulatedDeformConv",
    "PointSampler",
    "PyramidDeformConv",
    "PyramidGrid",
    "conv_norm",
    "corner_pool",
    "sampled_conv",
]
