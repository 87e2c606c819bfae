#!/usr/bin/env python
"""Train and evaluate LSNet, or any of Detectron2's meta-architectures, from a config file."""

import argparse
import logging
import sys

import torch
from detectron2.engine import default_argument_parser, launch

import lsnet_d2  # noqa: F401  (registers the model, the backbones and the data sets)
from lsnet_d2.config_file import load_config, merge_config
from lsnet_d2.data.annotation_checks import AnnotationError
from lsnet_d2.engine import LSNetTrainer, evaluate
from lsnet_d2.errors import ConfigError, UserError, exit_on_user_error
from lsnet_d2.launching import (
    INTERRUPTED,
    adopt_torchrun,
    describe_interruption,
    reporting_once,
    run_in_group,
)
from lsnet_d2.run_setup import setup


@exit_on_user_error(AnnotationError)
def run(args: argparse.Namespace) -> None:
    """What each process does."""
    logging.raiseExceptions = False  # a full disk is reported once, not for each line of the log
    with reporting_once():
        cfg = setup(args)
        if args.eval_only:
            evaluate(cfg, resume=args.resume)
        else:
            trainer = LSNetTrainer(cfg)
            trainer.resume_or_load(resume=args.resume)
            trainer.train()
    if torch.distributed.is_initialized():
        # A process that exits before its group has ended its threads may be aborted.
        torch.distributed.destroy_process_group()


def check_processes(args: argparse.Namespace) -> None:
    """Refuse what would fail in the started processes, where it is hard to read."""
    if not args.config_file:
        raise ConfigError("give a --config-file")
    device = torch.device(load_config(args.config_file, args.opts).MODEL.DEVICE)
    asked_for = merge_config(args.config_file, args.opts).MODEL.DEVICE
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines count processes: give 1 or more")
    if device.type == "cuda" and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but there are {torch.cuda.device_count()} here"
        )
    several = args.num_gpus * args.num_machines > 1
    if several and device.type != "cuda" and asked_for == "auto":
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but there is no GPU here; for several processes on "
            "the CPU set MODEL.DEVICE cpu"
        )
    if several and device.index is not None:
        raise ConfigError(
            f"MODEL.DEVICE is {asked_for!r}, but each process takes a GPU of its own: set it to "
            f"{device.type!r}, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if several and device.type != "cuda" and torch.cuda.is_available():
        raise ConfigError(
            f"several processes on {device} beside a GPU: hide it with CUDA_VISIBLE_DEVICES="
        )


@exit_on_user_error(AnnotationError)
def main() -> None:
    args = default_argument_parser().parse_args()
    torchrun = adopt_torchrun(args)
    check_processes(args)
    try:
        if torchrun:
            return run_in_group(run, args)
        launch(
            run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except KeyboardInterrupt:
        output = merge_config(args.config_file, args.opts).OUTPUT_DIR
        print(describe_interruption(output), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name is None:
            sys.exit(error.exit_code)  # the process has said why
        hint = " (out of memory?)" if error.signal_name == "SIGKILL" else ""
        raise UserError(
            f"process {error.error_index} was ended by {error.signal_name}{hint}; --resume goes "
            "on from the last checkpoint"
        ) from error


if __name__ == "__main__":
    main()
