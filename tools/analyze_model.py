#!/usr/bin/env python
"""Parameters, operations, activations and structure of a config's model.

Weights are random, so nothing is detected. One multiply-add is one operation; what is counted and
what is not: lsnet_d2/analysis.py.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from fvcore.nn import flop_count_table
from torch import nn

from lsnet_d2.analysis import count_activations, count_flops
from lsnet_d2.config_file import load_config
from lsnet_d2.engine import LSNetTrainer
from lsnet_d2.errors import UserError, exit_on_user_error
from lsnet_d2.files import atomic_write

# A row of the zoo's tables: link to the config, other cells, parameters, operations
ZOO_ROW = re.compile(r"\| \[[^\]]+\]\((?P<config>[^)]+\.yaml)\) \|(.*\|)?[^|]*\|[^|]*\|$")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", help="a table of the parts of its model")
    what.add_argument(
        "--zoo",
        metavar="PAGE.md",
        help="write parameters and operations into the last two columns of the page's tables, in "
        "rows that begin with a link to a config",
    )
    parser.add_argument(
        "--size", nargs=2, type=int, default=(800, 1216), metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--depth", type=int, default=3, help="of the parts in the table")
    parser.add_argument("--structure", action="store_true", help="print the modules, too")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="last: KEY VALUE pairs of the config"
    )
    return parser


def build(config_file: str, opts: list[str]) -> nn.Module:
    """The model of a config, for inference on a CPU."""
    cfg = load_config(config_file, [*opts, "MODEL.DEVICE", "cpu"], need_data_sets=False)
    return LSNetTrainer.build_model(cfg).eval()


def num_parameters(model: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def report(args: argparse.Namespace) -> None:
    model = build(args.config_file, args.opts)
    if args.structure:
        print(model)
    flops, activations = count_flops(model, *args.size), count_activations(model, *args.size)
    print(flop_count_table(flops, max_depth=args.depth, activations=activations))
    print(
        f"{args.config_file} at {args.size[0]} x {args.size[1]}: "
        f"{num_parameters(model) / 1e6:.2f} M parameters, "
        f"{num_parameters(model, trained=True) / 1e6:.2f} M of them trained, "
        f"{flops.total() / 1e9:.1f} G multiply-adds, "
        f"{activations.total() / 1e6:.1f} M activations"
    )
    by_operator = ", ".join(f"{k} {v / 1e9:.2f} G" for k, v in flops.by_operator().most_common())
    print(f"Multiply-adds by operator: {by_operator}")
    print(f"Not counted: {', '.join(sorted(flops.unsupported_ops()))}")


def update_zoo(page: Path, size: tuple[int, int], opts: list[str]) -> int:
    """Fill in the measured columns of a page; returns the number of rows."""
    lines, count = page.read_text(encoding="utf-8").splitlines(), 0
    for number, line in enumerate(lines):
        row = ZOO_ROW.match(line)
        if not row:
            continue
        print(row["config"], file=sys.stderr)
        model = build(str(page.parent / row["config"]), opts)
        measured = (
            f"{num_parameters(model) / 1e6:.1f}",
            f"{count_flops(model, *size).total() / 1e9:.0f}",
        )
        cells = line.split("|")
        cells[-3:-1] = [f" {value} " for value in measured]
        lines[number] = "|".join(cells)
        count += 1
    if count:
        with atomic_write(page, "w") as file:
            file.write("\n".join(lines) + "\n")
    return count


@exit_on_user_error()
@torch.no_grad()
def main() -> None:
    args = get_parser().parse_args()
    if min(args.size) < 1:
        raise UserError(f"--size {args.size[0]} {args.size[1]}: both must be 1 or more")
    if args.config_file:
        report(args)
        return
    page = Path(args.zoo)
    if not page.is_file():
        raise UserError(f"no such page: {page}")
    count = update_zoo(page, args.size, args.opts)
    if not count:
        raise UserError(f"{page}: no row of a table begins with a link to a config")
    print(f"{page}: {count} models at {args.size[0]} x {args.size[1]}")


if __name__ == "__main__":
    main()
