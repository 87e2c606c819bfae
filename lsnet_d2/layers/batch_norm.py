"""Batch norm with fixed statistics."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FixedBatchNorm2d(nn.Module):
    """Batch norm that keeps its statistics, in training too, and learns weight and bias.

    As in the released code. Detectron2's ``FrozenBatchNorm2d`` fixes weight and bias as well.
    Weights are those of :class:`torch.nn.BatchNorm2d`.

    Args:
        num_features: C, for inputs (B, C, H, W).
        eps: added to the variance.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # counts what does not happen here
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Replace every :class:`torch.nn.BatchNorm2d` in ``module``; returns ``module``."""
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                norm = cls(child.num_features, child.eps)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
            else:
                cls.convert(child)
        return module
