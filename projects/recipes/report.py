"""Tables of a comparison: means and standard deviations over seeds."""

import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from plan import Variant
from rows import FIGURES, KINDS, Row, read_row, title_of
from versions import Version

from lsnet_d2.files import atomic_write

TITLES = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
_AT_ONCE = "\\*"


def best_point(rows: Iterable[Row], select: str) -> dict[str, str] | None:
    """The point of a grid whose training has the highest figure; None: none has any."""
    scored = [row for row in rows if row.scores.get(select) is not None]
    return max(scored, key=lambda row: row.scores[select]).point if scored else None


def summarize(values: list[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (n - 1), None where a value or a second one is missing."""
    if not values or None in values:
        return {"mean": None, "deviation": None}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation}


def cell(values: list[float | None], digits: int = 1) -> str:
    summary = summarize(values)
    if summary["mean"] is None:
        return ""
    text = f"{summary['mean']:,.{digits}f}"
    return text if summary["deviation"] is None else f"{text} ± {summary['deviation']:.{digits}f}"


def group_rows(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """By group, and name with the point of the grid."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.group, title_of(row.name, row.point)), []).append(row)
    return grouped


def tables(rows: list[Row]) -> str:
    """Markdown, for each group one table of each kind that its models predict."""
    text = []
    for group in dict.fromkeys(row.group for row in rows):
        members = {k[1]: v for k, v in group_rows(rows).items() if k[0] == group}
        for kind in KINDS:
            known = {
                name: runs
                for name, runs in members.items()
                if any(f"{kind}/AP" in run.scores for run in runs)
            }
            if not known:
                continue
            text += [
                f"| {group}: {TITLES[kind]} | runs | iterations | s / iteration | minutes | MiB | "
                f"M parameters | {' | '.join(FIGURES)} |",
                "|" + " --- |" * (7 + len(FIGURES)),
                *(_line(name, runs, kind) for name, runs in known.items()),
                "",
            ]
        lost = [n for n, runs in members.items() if all(run.diverged for run in runs)]
        text += [f"{group}: {name}: every run diverged.\n" for name in lost]
    return "\n".join(text)


def _line(name: str, runs: list[Row], kind: str) -> str:
    fine = [run for run in runs if not run.diverged]
    count = f"{len(fine)}" + (
        f", {len(runs) - len(fine)} diverged" if len(fine) < len(runs) else ""
    )
    mark = _AT_ONCE if any(run.jobs > 1 for run in fine) else ""
    steps = [run.step_seconds for run in fine]
    minutes = [
        None if s is None else s * r.iterations / 60 for s, r in zip(steps, fine, strict=True)
    ]
    cells = [
        *(name, count, cell([statistics.mean(run.iterations for run in fine)], 0)),
        *(cell(steps, 3) + mark, cell(minutes) + mark, cell([_peak(fine)], 0)),
        cell([_parameters(fine)]),
        *(cell([run.scores.get(f"{kind}/{figure}") for run in fine]) for figure in FIGURES),
    ]
    return f"| {' | '.join(cells)} |"


def _parameters(runs: list[Row]) -> float | None:
    """In millions."""
    return next((run.parameters / 1e6 for run in runs if run.parameters is not None), None)


def _peak(runs: list[Row]) -> float | None:
    return max((run.peak_memory for run in runs if run.peak_memory is not None), default=None)


def grid_table(variant: Variant, rows: list[Row]) -> str:
    """What was tried, and what was picked."""
    best = best_point(rows, variant.select)
    lines = [
        f"| {variant.group}: {variant.name}, seed {rows[0].seed} | {variant.select} | |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        value = "diverged" if row.diverged else cell([row.scores.get(variant.select)])
        lines.append(
            f"| {title_of('', row.point).strip(' ()')} | {value} | "
            f"{'taken' if row.point == best else ''} |"
        )
    return "\n".join([*lines, ""])


def rows_of_other_versions(output: Path, version: Version) -> list[Row]:
    """All that earlier comparisons in this folder have finished with other code, or elsewhere."""
    found = [read_row(path) for path in sorted(output.glob("*/*/seed*/row.json"))]
    return [row for row in found if row.version["key"] != version.key]


def other_table(rows: list[Row]) -> str:
    lines = [
        "Of other code, libraries or devices, not to be compared with the rest or one another:\n",
        "| model | seed | " + " | ".join(f"{kind}/AP" for kind in KINDS) + " | version |",
        "|" + " --- |" * (3 + len(KINDS)),
    ]
    for row in rows:
        scores = [cell([row.scores.get(f"{kind}/AP")]) for kind in KINDS]
        name = f"{row.group}: {title_of(row.name, row.point)}"
        lines.append(f"| {name} | {row.seed} | {' | '.join(scores)} | {describe(row.version)} |")
    return "\n".join([*lines, ""])


def describe(version: dict[str, str]) -> str:
    commit = version["commit"] or "no commit"
    return (
        f"code {version['code']} ({commit}), torch {version['torch']}, {version['detectron2']}, "
        f"{version['device']}"
    )


def write_report(
    output: Path, version: Version, rows: list[Row], grids: list[tuple[Variant, list[Row]]]
) -> str:
    """``table.md`` and ``results.json``; returns the text of the first."""
    others = rows_of_other_versions(output, version)
    parts = [tables(rows), *(grid_table(variant, tried) for variant, tried in grids)]
    described = list(dict.fromkeys(describe(row.version) for row in rows))
    seeds = sorted({row.seed for row in rows})
    parts.append(
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}. "
        f"{'; '.join(described)}. {time.strftime('%Y-%m-%d')}.\n"
    )
    if any(row.jobs > 1 for row in rows):
        parts.append(f"{_AT_ONCE} Several trainings ran at once: these times say nothing.\n")
    if others:
        parts.append(other_table(others))
    text = "\n".join(parts)
    content = {
        "version": {**asdict(version), "key": version.key},
        "summary": [_summary(*entry) for entry in group_rows(rows).items()],
        "rows": [asdict(row) for row in rows],
        "grids": [asdict(row) for _, tried in grids for row in tried],
        "others": [asdict(row) for row in others],
    }
    for name, document in (("table.md", text), ("results.json", json.dumps(content, indent=1))):
        with atomic_write(output / name, "w") as file:
            file.write(document)
    return text


def _summary(key: tuple[str, str], runs: list[Row]) -> dict:
    fine = [run for run in runs if not run.diverged]
    names = dict.fromkeys(name for run in fine for name in run.scores)
    return {
        "group": key[0],
        "name": key[1],
        "seeds": [run.seed for run in fine],
        "diverged": [run.seed for run in runs if run.diverged],
        "times_comparable": all(run.jobs == 1 for run in fine),
        "step_seconds": summarize([run.step_seconds for run in fine]),
        "peak_memory": _peak(fine),
        "parameters_in_millions": _parameters(fine),
        "scores": {name: summarize([run.scores.get(name) for run in fine]) for name in names},
    }
