"""What is to be compared, from a YAML file: groups of variants, budgets, grids.

projects/recipes/README.md describes the file.
"""

import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lsnet_d2.errors import ConfigError, did_you_mean

ROOT = Path(__file__).resolve().parents[2]

_PLAN_KEYS = ("groups", "opts", "budget", "seeds", "select", "evaluations", "data")
_VARIANT_KEYS = ("config", "opts", "grid", "budget", "select")
_BUDGETS = ("iterations", "minutes", "like")
_SELECT = re.compile(r"(bbox|segm|keypoints)/AP(50|75|s|m|l)?")


def slug(text: str) -> str:
    """A name of the plan as it is in names of files: its letters and digits, in lower case."""
    return re.sub(r"[\W_]+", "_", text.lower()).strip("_")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long is trained: one of the three, or none for the iterations of the config.

    Attributes:
        iterations: of training.
        minutes: of training, evaluation apart.
        like: another variant of the group, whose time of training is taken.
    """

    iterations: int | None = None
    minutes: float | None = None
    like: str | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table.

    Attributes:
        group, name: what the tables call it.
        config: path of the config file.
        opts: config keys and values, over those of the file.
        grid: keys, and the values that are tried for each; all combinations are.
        budget: of each of its trainings.
        select: the metric by which the best of the grid is picked, as in "bbox/AP".
    """

    group: str
    name: str
    config: Path
    opts: Mapping[str, str]
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    budget: Budget = Budget()
    select: str = "bbox/AP"

    @property
    def points(self) -> list[dict[str, str]]:
        """The combinations of the grid; without a grid, one that is empty."""
        return [
            dict(zip(self.grid, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]


@dataclass(frozen=True, kw_only=True)
class DataKey:
    """The folders of ``--data``, as the configs name them: ``{name}_train`` and ``{name}_val``.

    Attributes:
        name: of the data set.
        annotations: how the files begin, as in "person_keypoints".
    """

    name: str
    annotations: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    Attributes:
        variants: in the order of the file.
        seeds: that all are trained with, unless the command line has others.
        evaluations: number of evaluations in a training, the last at its end.
        data: what ``--data`` stands for; None: the plan's configs name their data themselves.
    """

    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    evaluations: int
    data: DataKey | None


def read_plan(path: str | Path, *, budget: Budget | None = None) -> Plan:
    """
    Args:
        path: a YAML file. Config files in it are relative to its folder.
        budget: that of every variant, in place of the file's.

    Raises:
        ConfigError: no such file, or a key or a value that is not one; the message names it.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a plain YAML file: {error}") from error
    _check_keys(content, _PLAN_KEYS, f"{path}")
    groups = content.get("groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(f"{path}: 'groups' must have one or more groups of variants")
    variants = []
    for group, members in groups.items():
        if not isinstance(members, dict) or not members:
            raise ConfigError(f"{path}: group {group!r} must have one or more variants")
        for name, entry in members.items():
            where = f"{path}: {group}: {name}"
            variants.append(_read_variant(where, path, group, name, entry, content, budget))
        _check_likes(path, [v for v in variants if v.group == str(group)])
    _check_slugs(path, variants)
    seeds = content.get("seeds", [1])
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) for s in seeds):
        raise ConfigError(f"{path}: 'seeds' must be a list of integers, not {seeds!r}")
    evaluations = content.get("evaluations", 1)
    if not isinstance(evaluations, int) or evaluations < 1:
        raise ConfigError(f"{path}: 'evaluations' must be 1 or more, not {evaluations!r}")
    return Plan(
        variants=tuple(variants),
        seeds=tuple(dict.fromkeys(seeds)),
        evaluations=evaluations,
        data=_read_data(path, content.get("data")),
    )


def _read_variant(
    where: str, path: Path, group: Any, name: Any, entry: Any, content: dict, budget: Budget | None
) -> Variant:
    _check_keys(entry, _VARIANT_KEYS, where)
    if not isinstance(entry.get("config"), str):
        raise ConfigError(f"{where}: 'config' must name a config file")
    config = (path.parent / entry["config"]).resolve()
    if not config.is_file():
        raise ConfigError(f"{where}: no such config file: {config}")
    grid = entry.get("grid", {})
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise ConfigError(f"{where}: 'grid' must have a list of values for each key")
    select = entry.get("select", content.get("select", "bbox/AP"))
    if not isinstance(select, str) or not _SELECT.fullmatch(select):
        raise ConfigError(f"{where}: 'select' is {select!r}; it must be like segm/AP or bbox/AP50")
    return Variant(
        group=str(group),
        name=str(name),
        config=config,
        opts={**_read_opts(path, content), **_read_opts(where, entry)},
        grid={key: tuple(map(str, values)) for key, values in grid.items()},
        budget=budget or _read_budget(where, entry.get("budget", content.get("budget"))),
        select=select,
    )


def _read_opts(where: str | Path, entry: dict) -> dict[str, str]:
    opts = entry.get("opts") or {}
    if not isinstance(opts, dict):
        raise ConfigError(f"{where}: 'opts' must have config keys with their values")
    return {str(key): str(value) for key, value in opts.items()}


def _read_budget(where: str, entry: Any) -> Budget:
    if entry is None:
        return Budget()
    _check_keys(entry, _BUDGETS, f"{where}: budget")
    budget = Budget(**entry)
    numbers = [n for n in (budget.iterations, budget.minutes) if n is not None]
    if len(entry) != 1 or not all(isinstance(n, (int, float)) and n > 0 for n in numbers):
        raise ConfigError(
            f"{where}: 'budget' is {entry}; it must be a positive number of iterations or minutes, "
            "or like another variant"
        )
    return budget


def _check_likes(path: Path, group: list[Variant]) -> None:
    """Whom others are like has a budget of its own."""
    known = {v.name for v in group if v.budget.like is None and not v.grid}
    for variant in group:
        if variant.budget.like is not None and variant.budget.like not in known:
            raise ConfigError(
                f"{path}: {variant.group}: {variant.name}: its budget is like "
                f"{variant.budget.like!r}, which is no variant of this group with a budget of its "
                f"own and without a grid{did_you_mean(variant.budget.like, known)}"
            )


def _check_slugs(path: Path, variants: list[Variant]) -> None:
    """No group or variant may write the files of another."""
    groups = list(dict.fromkeys(variant.group for variant in variants))
    for titles in (groups, [f"{variant.group}: {variant.name}" for variant in variants]):
        seen: dict[str, str] = {}
        for title in titles:
            name = slug(title)
            if not name:
                raise ConfigError(f"{path}: {title!r} must have letters or digits, to name files")
            if name in seen:
                raise ConfigError(
                    f"{path}: the files of {title!r} would be those of {seen[name]!r}"
                )
            seen[name] = title


def _read_data(path: Path, entry: Any) -> DataKey | None:
    if entry is None:
        return None
    _check_keys(entry, ("name", "annotations"), f"{path}: data")
    if len(entry) != 2 or not all(isinstance(value, str) for value in entry.values()):
        raise ConfigError(f"{path}: 'data' must have a name, and how annotation files begin")
    return DataKey(**entry)


def _check_keys(entry: Any, known: Collection[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must have some of the keys {', '.join(known)}")
    for key in entry:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")
