"""Every command in the documentation names a tool, flags, configs and keys that there are."""

import argparse
import functools
import operator
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
from tiny_coco import ROOT

from lsnet_d2.config_file import merge_config
from lsnet_d2.webpage.__main__ import get_parser

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("configs/*/README.md")),
    *sorted(ROOT.glob("projects/*/README.md")),
]

# Configs that a command of the documentation writes.
MADE = {
    name for page in PAGES for name in re.findall(r"--write-config (\S+\.yaml)", page.read_text())
}

# Before a program: variables, loops and what starts several processes.
_BEFORE = re.compile(r"^(\w+=\S* |do |srun |torchrun (.*?)(?=\S+\.py ))*")
_PLACEHOLDER = re.compile(r"<[^>]*>|\bCONFIG\b")


def commands(page):
    """Lines of the page's fenced and indented blocks and of its code spans that run something of
    this project."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE)
    lines += re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    found = []
    for line in lines:
        line = _BEFORE.sub("", " ".join(line.split()))
        is_call = re.match(r"python3? (tools|projects)/|(tools|projects)/\S+\.py .*-|make \w", line)
        if is_call or line.startswith("lsnet-demo "):
            found.append(line)
    return found


def arguments(command):
    """Words of a command, up to a pipe or a redirection, with something for placeholders."""
    command = _PLACEHOLDER.sub("PLACEHOLDER", command)
    words = shlex.split(command, comments=True)
    ends = [index for index, word in enumerate(words) if re.fullmatch(r"[|>;]|\d?>|&&", word)]
    return words[: min(ends, default=len(words))]


class _ParserError(Exception):
    pass


def parser_of(script, monkeypatch):
    """The parser that a tool makes."""
    if script == "lsnet-demo":
        return get_parser()

    def found(parser, *args, **kwargs):
        raise _ParserError(parser)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        patch.setattr(argparse.ArgumentParser, "parse_args", found)
        with pytest.raises(_ParserError) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return caught.value.args[0]


def check_config(path, opts):
    """Shipped configs must be there; others are made by commands, and their keys are LSNet's."""
    is_made = path.startswith("output/") or path in MADE
    if is_made or "PLACEHOLDER" in path:
        path = ""
    else:
        assert (ROOT / path).is_file(), f"no {path}"
    file = str(ROOT / path) if path else ""
    defaults = merge_config(file)
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if "$" in value or "PLACEHOLDER" in value:  # not known here
            functools.reduce(operator.getitem, key.split("."), defaults)
        else:
            merge_config(file, [key, value])


def check_tool(command, monkeypatch):
    words = arguments(command)
    if words[0].startswith("python"):
        words = words[1:]
    script, *given = (word for word in words if word != "--help")
    assert script == "lsnet-demo" or (ROOT / script).is_file()
    if script != "lsnet-demo" and "parse" not in (ROOT / script).read_text():
        return
    parser = parser_of(script, monkeypatch)
    parser.allow_abbrev = False
    try:
        args = parser.parse_args(given)
    except SystemExit as exit_:
        raise AssertionError(f"{script} does not take: {command}") from exit_
    for name in ("config_file", "base_config"):
        path = getattr(args, name, None)
        if path:
            check_config(path, getattr(args, "opts", None) or [])


def check_make(command):
    words = [word for word in arguments(command)[1:] if "PLACEHOLDER" not in word]
    if "setup" in words:  # what it calls is no target; its variables are all there is
        source = (ROOT / "Makefile").read_text() + (ROOT / "tools" / "setup_env.py").read_text()
        assert all(word.partition("=")[0] in source for word in words)
        return
    # the variables of the make that runs the tests are not meant for this one
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    result = subprocess.run(
        ["make", "-n", "PYTHON=python", *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for config in re.findall(r"configs/\S+\.yaml", result.stdout):
        assert (ROOT / config).is_file()
    for word in words:
        name = word.partition("=")[0]
        assert "=" not in word or re.search(rf"^{name} \?=", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_fit_the_tools(page, monkeypatch):
    for command in commands(page):
        if command.startswith("make "):
            if shutil.which("make"):
                check_make(command)
        else:
            check_tool(command, monkeypatch)


def test_the_pages_have_commands():
    """Or else the test above would look at nothing."""
    found = {page.name: commands(page) for page in PAGES if page.name != "README.md"}
    readme = commands(ROOT / "README.md")
    assert sum(command.startswith("python tools/") for command in readme) >= 8
    assert "make demo TASK=joint" in readme
    assert len(found["custom_data.md"]) >= 8 and len(found["training.md"]) >= 5
    assert len(found["coco.md"]) >= 4
    assert 'make test ARGS="--parity-report -n 0"' in found["CONTRIBUTING.md"]


@pytest.mark.parametrize(
    "command",
    [
        "python tools/nothing.py --help",
        "python tools/train_net.py --config-file configs/bbox/nothing.yaml",
        "python tools/train_net.py --config configs/bbox/lsnet_R_50_FPN_1x.yaml",
        "python tools/train_net.py --config-file configs/bbox/lsnet_R_50_FPN_1x.yaml --half",
        "python tools/train_net.py --config-file configs/bbox/lsnet_R_50_FPN_1x.yaml SOLVER.LR 1",
        "lsnet-demo --config-file configs/bbox/lsnet_R_50_FPN_1x.yaml --share",
    ],
)
def test_a_command_that_has_rotted_is_found(command, monkeypatch):
    with pytest.raises(Exception, match=r"no |does not take|unknown|assert|nothing.py"):
        check_tool(command, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page):
    text = page.read_text()
    paths = re.findall(
        r"(?<![\w/.{}])((?:configs|tools|docs|projects|tests|lsnet_d2|requirements)/[\w./-]+\."
        r"(?:yaml|py|md|txt|jpg))\b",
        text,
    )
    for path in paths:
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
