#!/usr/bin/env python
"""As tools/train_net.py in one process; metrics have the model's size and the peak of memory.

A training whose loss or weights are no numbers any more ends with a status of its own, which
``runs.py`` knows.
"""

import resource
import sys

import torch
from detectron2.engine import HookBase, default_argument_parser

import lsnet_d2  # noqa: F401  (registers the model, the backbones and the data sets)
from lsnet_d2.data.annotation_checks import AnnotationError
from lsnet_d2.engine import LSNetTrainer
from lsnet_d2.errors import (
    NonFiniteLossError,
    NonFiniteWeightsError,
    TrainingError,
    exit_on_user_error,
    one_line,
)
from lsnet_d2.run_setup import setup

DIVERGED = 3


class Footprint(HookBase):
    """Writes how large the model is, ``parameters``, and ``peak_memory``, in MiB: on CUDA of what
    torch has allocated, elsewhere of the whole process, without the workers that load data."""

    def before_train(self) -> None:
        self._parameters = sum(p.numel() for p in self.trainer.model.parameters())

    def after_step(self) -> None:
        device = torch.device(self.trainer.cfg.MODEL.DEVICE)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        self.trainer.storage.put_scalar("peak_memory", peak, smoothing_hint=False)
        self.trainer.storage.put_scalar("parameters", self._parameters, smoothing_hint=False)


class RecipeTrainer(LSNetTrainer):
    def build_hooks(self) -> list[HookBase]:
        return [Footprint(), *super().build_hooks()]


def has_diverged(error: Exception) -> bool:
    """Whether a training ended for its numbers, which it would do again.

    Detectron2's R-CNNs find proposals that are no numbers themselves, with a FloatingPointError.
    """
    numbers = (FloatingPointError, NonFiniteLossError, NonFiniteWeightsError)
    return isinstance(error, numbers) or isinstance(error.__cause__, FloatingPointError)


@exit_on_user_error(AnnotationError)
def main() -> None:
    args = default_argument_parser().parse_args()
    trainer = RecipeTrainer(setup(args))
    trainer.resume_or_load(resume=args.resume)
    try:
        trainer.train()
    except (FloatingPointError, TrainingError) as error:
        if not has_diverged(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(DIVERGED)


if __name__ == "__main__":
    main()
