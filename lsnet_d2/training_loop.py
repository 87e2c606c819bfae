"""The step of training: Detectron2's, with mixed precision on any device and parts of batches."""

import contextlib
import math
import time
from collections.abc import Iterable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ConfigError, NonFiniteLossError

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = ("auto", *_PRECISIONS)  # of SOLVER.AMP.PRECISION


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
            f"SOLVER.AMP.PRECISION is {name!r}; it must be one of {', '.join(PRECISIONS)}"
        )
    return _PRECISIONS[name]


class LSNetTrainLoop(SimpleTrainer):
    """One step of the optimizer from one or more batches.

    With a lower precision, convolutions and matrix products are computed in it, and the losses in
    float32; parameters and gradients are float32 anyway. Gradients of float16 are scaled (and steps
    in which they overflow are left out), as in "Mixed Precision Training" (arXiv 1710.03740).
    Detectron2's ``AMPTrainer`` does that on GPUs.

    A loss that is not finite ends the training, in all processes and before the weights change.
    (Detectron2's trainers notice it in the main process only, and do not say for which images.)
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
        """
        Raises:
            NonFiniteLossError: in every process, when a loss of one of them is not finite.
        """
        assert self.model.training, "the model was set to evaluation during training"
        self.optimizer.zero_grad()
        found, batches, data_time = [], [], 0.0
        for number in range(1, self.accumulation_steps + 1):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            with self._synchronized(number == self.accumulation_steps):
                losses = self._losses(batch)
                total = sum(losses.values()) / self.accumulation_steps
                self.grad_scaler.scale(total).backward()
            found.append(losses)
            batches.append(batch)
        self.after_backward()
        means = {name: sum(losses[name] for losses in found) / len(found) for name in found[0]}
        self._share_metrics(means, data_time, batches)
        # Before the step, where gradients are clipped: a fused optimizer would unscale them after.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _share_metrics(
        self, losses: dict[str, Tensor], data_time: float, batches: list[list[dict]]
    ) -> None:
        """As ``SimpleTrainer.write_metrics``, but every process gets what each has found."""
        stacked = torch.stack([value.detach().float() for value in losses.values()])
        values = dict(zip(losses, stacked.tolist(), strict=True))
        broken = {name: value for name, value in values.items() if not math.isfinite(value)}
        files = [str(i.get("file_name")) for b in batches for i in b] if broken else []
        shared = comm.all_gather((values, data_time, broken, files))
        for rank, (_, _, broken, files) in enumerate(shared):
            if broken:
                raise NonFiniteLossError(
                    self.iter, broken, files, process=rank if len(shared) > 1 else None
                )
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time)
        if comm.is_main_process():
            means = {name: float(np.mean([v[name] for v, *_ in shared])) for name in values}
            storage.put_scalar("data_time", max(time for _, time, *_ in shared))
            storage.put_scalar("total_loss", sum(means.values()))
            if len(means) > 1:
                storage.put_scalars(**means)

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


def wrap_distributed(model: nn.Module) -> nn.Module:
    """Data-parallel training where there are several processes, on the device of the model.

    Gradients of weights that take no part are not waited for, where the model has such.
    """
    device = next(model.parameters()).device
    return create_ddp_model(
        model,
        broadcast_buffers=False,
        device_ids=[comm.get_local_rank()] if device.type == "cuda" else None,
        find_unused_parameters=bool(getattr(model, "unused_features", ())),
    )
