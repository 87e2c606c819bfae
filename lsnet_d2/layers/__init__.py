from .deform_conv import ModulatedDeformConv, sampled_conv
from .pyramid_sampling import PyramidDeformConv, PyramidGrid

__all__ = ["ModulatedDeformConv", "PyramidDeformConv", "PyramidGrid", "sampled_conv"]
