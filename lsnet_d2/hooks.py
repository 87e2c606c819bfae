"""Hooks of a training: the mean of its weights, its checkpoints, the best of them, and its end."""

import itertools
import logging
import math

from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .checkpointer import LSNetCheckpointer
from .errors import CheckpointError, ConfigError, NonFiniteWeightsError
from .stopping import agree

logger = logging.getLogger(__name__)

BEST = "model_best"


class WeightAverage(HookBase):
    """An exponential moving average of the weights, taken after every iteration.

    The n-th update keeps ``min(decay, (n - 1) / (n + 8))`` of the mean, so that the first ones
    count little. Buffers, such as the statistics of batch norm, are those of the trained model.

    Attributes:
        averaged: the model with the mean of the weights, to evaluate.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: the trained one, not wrapped.
        """
        self._model = model
        self._decay = decay
        self._average = AveragedModel(model, multi_avg_fn=self._update)

    @property
    def averaged(self) -> nn.Module:
        return self._average.module

    def _update(self, averages: list[Tensor], weights: list[Tensor], _: Tensor) -> None:
        done = int(self._average.n_averaged)  # the argument may be on a device, and slow to read
        get_ema_multi_avg_fn(min(self._decay, done / (done + 9)))(averages, weights, done)

    def start(self) -> None:
        """Begin anew, with the weights that the trained model has now."""
        self.averaged.load_state_dict(self._model.state_dict())
        self._average.n_averaged.zero_()

    def after_step(self) -> None:
        self._average.update_parameters(self._model)

    # A checkpoint has the averaged weights for "model", and this beside them.

    def checkpoint_state(self) -> dict:
        """The trained weights, and the number of updates."""
        return {"trained": self._model.state_dict(), "updates": int(self._average.n_averaged)}

    def load_checkpoint_state(self, state: dict) -> None:
        """
        Args:
            state: of :meth:`checkpoint_state`; the averaged weights are in the trained model.
        """
        self.averaged.load_state_dict(self._model.state_dict())
        self._model.load_state_dict(state["trained"])
        self._average.n_averaged.fill_(state["updates"])


class CheckpointOfAverage:
    """A :class:`WeightAverage` as checkpointers want it. (Hooks have a ``state_dict`` too, which
    the trainer saves.)"""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average
        self.state_dict = average.checkpoint_state
        self.load_state_dict = average.load_checkpoint_state


class WeightCheck(HookBase):
    """Before anything is evaluated or saved: weights that are not finite end the training.

    Gradients may overflow while the loss is finite; so may the statistics of batch norm, on which
    the loss of a training does not depend.
    """

    def __init__(self, periods: tuple[int, ...]) -> None:
        """
        Args:
            periods: in iterations; each of them, and the last iteration, are looked at.
        """
        self._periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done < self.trainer.max_iter and all(done % period for period in self._periods):
            return
        # each process has buffers of its own
        found = next((name for name in comm.all_gather(self._first_broken()) if name), None)
        if found:
            raise NonFiniteWeightsError(
                f"iteration {self.trainer.iter}: {found} is not finite any more, though the loss "
                "is; nothing was saved of it. A lower SOLVER.BASE_LR or SOLVER.CLIP_GRADIENTS may "
                "help; --resume goes on from the last checkpoint"
            ).everywhere()

    def _first_broken(self) -> str | None:
        model = self.trainer.model
        weights = (("the weight", *named) for named in model.named_parameters())
        buffers = (("the buffer", *named) for named in model.named_buffers())
        for kind, name, value in itertools.chain(weights, buffers):
            if value.is_floating_point() and not value.isfinite().all():
                return f"{kind} {name}"
        return None


class TrainingCheckpointer(PeriodicCheckpointer):
    """Detectron2's, for a training whose end may come nearer."""

    def after_step(self) -> None:
        self.max_iter = self.trainer.max_iter
        super().after_step()


class BestMetric(HookBase):
    """Keeps the checkpoint with the best value of a metric, and ends a training without progress.

    It does what Detectron2's ``BestCheckpointer`` does, and can be resumed: the best value and the
    number of evaluations since are in the checkpoints. The file is ``model_best.pth``; a resumed
    training goes on from the last checkpoint, not from this one.
    """

    def __init__(
        self,
        checkpointer: LSNetCheckpointer,
        metric: str,
        *,
        period: int,
        mode: str = "max",
        patience: int = 0,
    ) -> None:
        """
        Args:
            metric: as it is in ``metrics.json``, such as "bbox/AP".
            period: of the evaluation, which comes before this hook.
            mode: "max" or "min".
            patience: evaluations in a row without a better value, after which the training ends.
                0: it does not.
        """
        self._checkpointer = checkpointer
        self._metric = metric
        self._period = period
        self._mode = mode
        self._sign = {"max": 1, "min": -1}[mode]
        self._patience = patience
        self.best: float | None = None
        self.best_iteration: int | None = None
        self.waited = 0

    def state_dict(self) -> dict:
        return {
            "metric": [self._mode, self._metric],
            "best": self.best,
            "best_iteration": self.best_iteration,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict) -> None:
        # Checkpoints of before 2026-11-28 do not say of which metric they are.
        wanted = [self._mode, self._metric]
        if (found := state.get("metric", wanted)) != wanted:
            logger.warning(
                "The checkpoint has the %s of %s; the best %s is sought anew", *found, self._metric
            )
            return
        self.best = state["best"]
        self.best_iteration = state["best_iteration"]
        self.waited = state["waited"]

    def before_train(self) -> None:
        if self._is_out_of_patience():  # the training that is resumed had ended
            self.trainer.max_iter = self.trainer.start_iter

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period or done == self.trainer.max_iter:
            return
        self._look(self.trainer.iter)
        if self._is_out_of_patience():
            logger.info(
                "No better %s than %g, of iteration %d, in %d evaluations (TEST.PATIENCE): the "
                "training ends",
                self._metric,
                self.best if self.best is not None else math.nan,
                self.best_iteration if self.best_iteration is not None else -1,
                self.waited,
            )
            self.trainer.max_iter = done

    def after_train(self) -> None:
        # As Detectron2's evaluation: not after a failure. An early end has been looked at.
        if self.trainer.iter >= self.trainer.max_iter and not self._is_out_of_patience():
            self._look(self.trainer.iter - 1)

    def _is_out_of_patience(self) -> bool:
        return bool(self._patience) and self.waited >= self._patience

    def _look(self, iteration: int) -> None:
        storage = self.trainer.storage
        found = agree(
            {
                name: value
                for name, (value, when) in storage.latest().items()
                if "/" in name and when == storage.iter
            }
        )
        if self._metric not in found:
            raise ConfigError(
                f"TEST.BEST_METRIC is {self._metric!r}, which the evaluation does not give; it "
                f"gives {', '.join(sorted(found)) or 'nothing'}"
            ).everywhere()
        value = found[self._metric]
        if not math.isfinite(value):  # as an AP is while nothing is found
            self.waited += self.best is not None
            return
        if self.best is not None and self._sign * (value - self.best) <= 0:
            self.waited += 1
            return
        self.best, self.best_iteration, self.waited = value, iteration, 0
        logger.info("The best %s so far: %g (%s)", self._metric, value, BEST)
        self._checkpointer.save(BEST, iteration=iteration, as_last=False)


def refuse_other_average(path: str, *, saved: bool, wanted: bool) -> None:
    """
    Raises:
        CheckpointError: a training with averaged weights is to go on without.
    """
    if saved and not wanted:
        raise CheckpointError(
            f"{path} is of a training with averaged weights: SOLVER.EMA.ENABLED must be True to go "
            "on with it"
        )
    if wanted and not saved:
        logger.warning("%s has no averaged weights: the mean starts here", path)
