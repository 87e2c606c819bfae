"""Processes that someone else has started: torchrun, or Slurm with torchrun.

Detectron2's ``launch`` starts its own.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from .checkpointer import LSNetCheckpointer
from .errors import ConfigError, UserError, one_line

INTERRUPTED = 130  # exit status of what Ctrl-C has ended, as shells have it


def adopt_torchrun(args: argparse.Namespace) -> bool:
    """Whether torchrun has started this process; if so, ``args`` get its numbers of processes.

    Args:
        args: of ``detectron2.engine.default_argument_parser``.

    Raises:
        ConfigError: processes are asked for besides those of torchrun.
    """
    if not dist.is_torchelastic_launched():
        return False
    if args.num_gpus != 1 or args.num_machines != 1 or args.machine_rank != 0:
        raise ConfigError(
            "torchrun has started the processes: leave out --num-gpus, --num-machines and "
            "--machine-rank"
        )
    args.num_gpus = int(os.environ["LOCAL_WORLD_SIZE"])
    args.num_machines = int(os.environ["WORLD_SIZE"]) // args.num_gpus
    args.machine_rank = int(os.environ["GROUP_RANK"])
    return True


def run_in_group(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Join the processes of torchrun, on a GPU of its own each where there are any, and run.

    Args:
        args: of :func:`adopt_torchrun`.
    """
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend="nccl" if on_gpus else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(args.num_gpus)
    comm.synchronize()
    run(args)


@contextmanager
def reporting_once() -> Iterator[None]:
    """Of an error that all processes raise, the main one prints the message.

    The others wait for it: the first process that ends has the rest ended.
    """
    try:
        yield
    except UserError as error:
        if comm.get_world_size() == 1 or not error.in_all_processes:
            raise
        if comm.is_main_process():
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        comm.synchronize()
        sys.exit(2)


def describe_interruption(output_dir: str) -> str:
    """What Ctrl-C leaves, and how to go on."""
    files = LSNetCheckpointer(torch.nn.Identity(), output_dir, save_to_disk=False)
    last = files.get_checkpoint_file() if files.has_checkpoint() else ""
    if not os.path.isfile(last):
        return f"interrupted before the first checkpoint in {output_dir}"
    return f"interrupted; the same command with --resume goes on from {last}"
