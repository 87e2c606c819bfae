#!/usr/bin/env python
"""Convert a checkpoint of the released LSNet code for the model of a config.

Every weight is accounted for, one line each: renamed, left out (counters of batch norm, which have
no effect), or refused. Nothing is written unless each one of the model has been found, and none is
left over. The file is read as data: nothing in it is executed.
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from lsnet_d2.checkpoint import (
    convert_lsnet_checkpoint,
    is_released_checkpoint,
    released_names,
)
from lsnet_d2.config_file import load_config
from lsnet_d2.engine import LSNetTrainer
from lsnet_d2.errors import CheckpointError, exit_on_user_error
from lsnet_d2.files import atomic_write, require_new_file
from lsnet_d2.imagenet import is_counter
from lsnet_d2.weight_files import read_weights


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", metavar="IN.pth", help="a checkpoint of the released code")
    parser.add_argument("output", metavar="OUT.pth", help="for MODEL.WEIGHTS")
    parser.add_argument("--config-file", required=True, help="the same model's config here")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.pth")
    parser.add_argument("--quiet", action="store_true", help="list only what is refused or missing")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="last: KEY VALUE pairs of the config"
    )
    return parser


def account(
    weights: Mapping[str, Any], expected: Mapping[str, torch.Tensor]
) -> list[tuple[str, str, str]]:
    """What becomes of each weight of a checkpoint, and what is missing.

    Args:
        weights: of the released code.
        expected: the weights of our model.

    Returns:
        Triples: "renamed", "left out", "refused" or "missing"; the name; an explanation.
    """
    entries, found = [], set()
    for key, name in released_names(weights).items():
        if is_counter(key):
            entries.append(("left out", key, "a counter without effect"))
        elif name is None:
            entries.append(("refused", key, "of no known layer"))
        elif name in found:
            entries.append(("refused", key, f"there is another {name}"))
        elif name not in expected:
            entries.append(("refused", key, f"the model has no {name}"))
        elif (shape := _shape(weights[key])) != list(expected[name].shape):
            found.add(name)
            ours = list(expected[name].shape)
            entries.append(("refused", key, f"{shape}, but {name} is {ours}"))
        else:
            found.add(name)
            entries.append(("renamed", key, f"{name} {shape}"))
    missing = (name for name in expected if name not in found and not is_counter(name))
    return entries + [("missing", name, "in the checkpoint") for name in missing]


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


@exit_on_user_error()
def main() -> None:
    args = get_parser().parse_args()
    require_new_file(args.output, overwrite=args.overwrite)
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts])
    weights = read_weights(args.input)
    if not is_released_checkpoint(weights):
        raise CheckpointError(f"{args.input} is no checkpoint of the released LSNet code")
    entries = account(weights, LSNetTrainer.build_model(cfg).state_dict())
    counts = Counter(status for status, _, _ in entries)
    for status, name, explanation in entries:
        if not args.quiet or status in ("refused", "missing"):
            print(f"{status:8}  {name}  {explanation}")
    try:
        converted = convert_lsnet_checkpoint(weights, cfg)
    except ValueError as error:
        raise CheckpointError(f"{args.input}: {error}") from error
    if counts["refused"] or counts["missing"]:
        raise CheckpointError(
            f"{args.input} is not of the model of {args.config_file}: {counts['refused']} weights "
            f"are refused and {counts['missing']} are missing, as listed above"
        )
    with atomic_write(args.output) as file:
        torch.save({"model": converted}, file)
    print(f"{args.output}: {counts['renamed']} weights, {counts['left out']} counters left out")


if __name__ == "__main__":
    main()
