"""How a training ends: at its last iteration, before it by choice, or because it cannot go on."""

import logging

from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from .errors import TrainingError, UserError, one_line

logger = logging.getLogger(__name__)


class StoppableTrainer(TrainerBase):
    """Detectron2's loop over iterations, with other ends.

    - A hook may lower ``max_iter`` to end the training after the iteration at hand, as if it were
      the last one.
    - Errors of the user's world, of the disk, and of workers that died, become a UserError, and are
      not logged with a traceback.
    - After an error, or Ctrl-C, hooks only close what they have opened. (In Detectron2 those that
      act at the end do so too if it happens in the last iteration.)
    """

    def train(self, start_iter: int, max_iter: int) -> None:
        """
        Raises:
            UserError: of any kind; :class:`TrainingError` where a file cannot be written, or a
                worker that loads data has ended.
        """
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                while self.iter < self.max_iter:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    self.iter += 1
            except BaseException as error:
                self._end_early()
                reported = _as_user_error(error, self.iter)
                if reported is error:
                    raise
                raise reported from error
            self.after_train()

    def _end_early(self) -> None:
        """Let hooks close what they have opened; a second error must not hide the first one."""
        max_iter, self.max_iter = self.max_iter, self.iter + 2  # to them it is not the last one
        for hook in self._hooks:
            try:
                hook.after_train()
            except Exception as error:
                logger.warning("%s at the end: %s", type(hook).__name__, one_line(error))
        self.max_iter = max_iter


def _as_user_error(error: BaseException, iteration: int) -> BaseException:
    # of torch, which may raise it anywhere, whatever the main process is doing; or what comes of
    # reading from a worker that is gone
    worker = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    if worker or isinstance(error, (ConnectionError, EOFError)):
        reason = one_line(error).partition(" It is possible")[0] or type(error).__name__
        return TrainingError(
            f"iteration {iteration}: a process that loads images has ended ({reason}). There may "
            "be too little memory: try a lower DATALOADER.NUM_WORKERS. --resume goes on from the "
            "last checkpoint"
        )
    if isinstance(error, OSError) and error.strerror and not isinstance(error, UserError):
        where = f"{error.filename}: " if error.filename else ""
        return TrainingError(f"iteration {iteration}: {where}{error.strerror}")
    return error


def agree(mine: object) -> object:
    """What the main process says, in all processes."""
    return comm.all_gather(mine)[0]
