"""The set-up of a run, before there is a model: config, output folder, log files, random seeds."""

import argparse
import logging
import os
from contextlib import nullcontext

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .config_file import CHECKPOINT_SUFFIX, load_config
from .errors import ConfigError
from .files import keeping, require_writable
from .solver import scale_schedule

logger = logging.getLogger(__name__)


def log_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's ``default_setup``.

    That would log a checkpoint given as ``config_file``, and write ``config.yaml`` for an
    evaluation in the place of the training's, with which that goes on.
    """
    if args.config_file.endswith(CHECKPOINT_SUFFIX):
        logger.info("The config is that of %s", args.config_file)
        args = argparse.Namespace(**{**vars(args), "config_file": ""})
    evaluates = getattr(args, "eval_only", False) and comm.is_main_process()
    file = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    with keeping(file) if evaluates else nullcontext():
        default_setup(cfg, args)


def setup(args: argparse.Namespace) -> CfgNode:
    """Config, log files and random seeds of a run.

    Args:
        args: of ``detectron2.engine.default_argument_parser``.

    Returns:
        The frozen config, with a device that exists and the schedule of its batch
        (:func:`lsnet_d2.solver.scale_schedule`).

    Raises:
        ConfigError: see :func:`lsnet_d2.config_file.load_config`.
        UserError: nothing can be written into ``OUTPUT_DIR``.
    """
    cfg = load_config(args.config_file, args.opts)
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: {error.strerror}") from error
    require_writable(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="lsnet_d2")
    scale_schedule(cfg, given=args.opts[::2])
    cfg.freeze()
    log_setup(cfg, args)
    logger.info("Running on device %s", cfg.MODEL.DEVICE)
    return cfg
