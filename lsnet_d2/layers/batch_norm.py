"""Batch norm with fixed statistics."""

import torch.nn.functional as F
from torch import Tensor, nn


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that keeps its statistics, in training too, and learns weight and bias.

    As in the released code. Detectron2's ``FrozenBatchNorm2d`` fixes weight and bias as well.
    Weights are those of :class:`torch.nn.BatchNorm2d` but for the count of batches. Being one, it
    is a norm for ``SOLVER.WEIGHT_DECAY_NORM`` too.

    Args:
        num_features: C, for inputs (B, C, H, W).
        eps: added to the variance.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps, momentum=0.0)
        self.num_batches_tracked = None  # counts what does not happen here
        self.eval()

    def train(self, mode: bool = True) -> "FixedBatchNorm2d":
        """Leaves it in evaluation: one in training would have its statistics replaced by
        Detectron2's ``TEST.PRECISE_BN``."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        # weights without a version would be given a count again
        local_metadata = {**local_metadata, "version": self._version}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def fold(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Kernel and bias of the convolution that does what one with this norm behind it does.

        Gradients of the norm's weight and bias flow through them, so that neither the norm nor its
        backward pass touches a feature map.

        Args:
            weight: (C, C_in / groups, kh, kw).
            bias: (C,), or None.
        """
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        if bias is not None:
            shift = shift + bias * scale
        return weight * scale.view(-1, 1, 1, 1), shift

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Replace every batch norm in ``module``; what is trained stays so.

        Returns:
            ``module``, or its replacement where it is a batch norm itself.
        """
        if isinstance(module, cls):
            return module
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            norm = cls(module.num_features, module.eps)
            norm.load_state_dict(module.state_dict())
            for ours, theirs in zip(norm.parameters(), module.parameters(), strict=True):
                ours.requires_grad_(theirs.requires_grad)
            return norm
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child))
        return module


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module | None) -> Tensor:
    """``norm(conv(x))``, in one step where the norm can be folded into the convolution.

    Args:
        x: (B, C_in, H, W).
        conv: whose own ``forward`` is not called; padded with zeros.
    """
    folded = isinstance(norm, FixedBatchNorm2d)
    weight, bias = norm.fold(conv.weight, conv.bias) if folded else (conv.weight, conv.bias)
    x = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return x if folded or norm is None else norm(x)
