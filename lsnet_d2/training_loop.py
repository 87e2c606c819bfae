"""The step of training: Detectron2's, with mixed precision on any device and parts of batches."""

import contextlib
import time
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ConfigError

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The lower precision of ``SOLVER.AMP``; None: all is computed in float32.

    Raises:
        ConfigError: the precision is unknown.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    name = cfg.SOLVER.AMP.PRECISION
    if name == "auto":
        on_cuda = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        return torch.float16 if on_cuda else torch.bfloat16
    if name not in _PRECISIONS:
        raise ConfigError(
            f"SOLVER.AMP.PRECISION is {name!r}; it must be one of auto, {', '.join(_PRECISIONS)}"
        )
    return _PRECISIONS[name]


class LSNetTrainLoop(SimpleTrainer):
    """One step of the optimizer from one or more batches.

    With a lower precision, convolutions and matrix products are computed in it, and the losses in
    float32; parameters and gradients are float32 anyway. Gradients of float16 are scaled (and steps
    in which they overflow are left out), as in "Mixed Precision Training" (arXiv 1710.03740).
    Detectron2's ``AMPTrainer`` does that on GPUs.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: Optimizer,
        *,
        amp_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        """
        Args:
            model: gives losses by name; possibly wrapped for several processes.
            amp_dtype: the lower precision; None: float32.
            accumulation_steps: batches of ``data_loader`` whose mean gradient makes a step.
        """
        super().__init__(model, data_loader, optimizer)
        self.device_type = next(model.parameters()).device.type
        self.amp_dtype = amp_dtype
        self.accumulation_steps = accumulation_steps
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=amp_dtype is torch.float16
        )

    def run_step(self) -> None:
        assert self.model.training, "the model was set to evaluation during training"
        self.optimizer.zero_grad()
        found, data_time = [], 0.0
        for number in range(1, self.accumulation_steps + 1):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            with self._synchronized(number == self.accumulation_steps):
                losses = self._losses(batch)
                total = sum(losses.values()) / self.accumulation_steps
                self.grad_scaler.scale(total).backward()
            found.append(losses)
        self.after_backward()
        self._write_metrics(
            {name: sum(losses[name] for losses in found) / len(found) for name in found[0]},
            data_time,
        )
        # Before the step, where gradients are clipped: a fused optimizer would unscale them after.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _losses(self, batch: list[dict]) -> dict[str, Tensor]:
        if self.amp_dtype is None:
            return self.model(batch)
        with torch.autocast(self.device_type, dtype=self.amp_dtype):
            return self.model(batch)

    def _synchronized(self, now: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once, of all batches of a step."""
        several = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return contextlib.nullcontext() if now or not several else self.model.no_sync()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # None, or an empty one, is that of a training without scaling.
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
