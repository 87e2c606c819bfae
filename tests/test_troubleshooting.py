"""The messages that docs/troubleshooting.md quotes are those of the program."""

import ast
import re

import pytest
from tiny_coco import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"^> `(.+)`$", PAGE.read_text(), flags=re.MULTILINE)
SOURCES = [
    *sorted((ROOT / "lsnet_d2").rglob("*.py")),
    *sorted((ROOT / "tools").glob("*.py")),
]


def texts(source):
    """The strings of a program, with … for what is put into them."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[ds]|\{\w*\}", "…", node.value)


def fits(message, text):
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    return re.search(pattern, text, flags=re.DOTALL) is not None


@pytest.fixture(scope="module")
def known():
    return [text for source in SOURCES for text in texts(source)]


def test_the_page_has_messages():
    assert len(MESSAGES) >= 15
    # one that consists of places to fill in would fit anything
    assert all(len(message.replace("…", "")) > 25 for message in MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_the_programs(message, known):
    assert any(fits(message, text) for text in known)


def test_other_messages_are_found_out(known):
    assert not any(fits("MODEL.DEVICE is …, but there is no GPU here", text) for text in known)
