"""How a training ends: at its last iteration, before it by choice, or because it cannot go on."""

import logging

from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from .errors import DeadWorkerError, TrainingError, UserError, one_line, system_message

logger = logging.getLogger(__name__)


class StoppableTrainer(TrainerBase):
    """Detectron2's loop over iterations, with other ends.

    - A hook may lower ``max_iter`` to end the training after the iteration at hand, as if it were
      the last one.
    - Errors of the user's world, of the disk, of workers that died, and of boxes that are not
      finite, become a UserError, and are not logged with a traceback.
    - After an error, or Ctrl-C, hooks only close what they have opened. (In Detectron2 those that
      act at the end do so too if it happens in the last iteration.)
    """

    def train(self, start_iter: int, max_iter: int) -> None:
        """
        Raises:
            UserError: of any kind; :class:`TrainingError` where a file cannot be written, a worker
                that loads data has ended, or an R-CNN has diverged.
        """
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        self._ended = 0  # hooks whose after_train has been called
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                while self.iter < self.max_iter:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    self.iter += 1
                self.after_train()
            except BaseException as error:
                reported = _as_user_error(error, min(self.iter, self.max_iter - 1))
                self._end_early()
                if reported is error:
                    raise
                raise reported from error

    def after_train(self) -> None:
        """End the hooks, each of them once, whatever one of them raises."""
        self.storage.iter = self.iter
        while self._ended < len(self._hooks):
            self._ended += 1
            self._hooks[self._ended - 1].after_train()

    def _end_early(self) -> None:
        """Let hooks close what they have opened; a second error must not hide the first one."""
        max_iter, self.max_iter = self.max_iter, self.iter + 2  # to them it is not the last one
        while self._ended < len(self._hooks):
            hook = self._hooks[self._ended]
            self._ended += 1
            try:
                hook.after_train()
            except Exception as error:
                logger.warning("%s at the end: %s", type(hook).__name__, one_line(error))
        self.max_iter = max_iter


def _as_user_error(error: BaseException, iteration: int) -> BaseException:
    if dead := DeadWorkerError.find(error):
        return TrainingError(
            f"iteration {iteration}: {dead}. --resume goes on from the last checkpoint"
        )
    # of Detectron2's region proposals
    if isinstance(error, FloatingPointError) and "Training has diverged" in str(error):
        return TrainingError(
            f"iteration {iteration}: {one_line(error)} A lower SOLVER.BASE_LR, a longer "
            "SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS may help; --resume goes on from the last "
            "checkpoint"
        )
    if isinstance(error, OSError) and error.strerror and not isinstance(error, UserError):
        return TrainingError(f"iteration {iteration}: {system_message(error)}")
    return error


def agree(mine: object) -> object:
    """What the main process says, in all processes."""
    return comm.all_gather(mine)[0]
