"""lsnet-demo as it is started."""

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
import zipfile

import pytest
from tiny_coco import ROOT, tool_environment

from lsnet_d2.errors import UserError
from lsnet_d2.webpage import __main__ as command
from lsnet_d2.webpage.__main__ import main
from lsnet_d2.webpage.answer import Limits
from lsnet_d2.webpage.examples import find_examples


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch):
    """The log's handlers would outlive the test."""
    monkeypatch.setattr(command, "setup_logger", lambda **_: None)


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return exit_.value.code, out.err


def test_without_a_model_it_says_what_to_give(capsys):
    code, message = fails(capsys)
    assert code == 2
    assert message.startswith("error: no model: give a checkpoint")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "gone.yaml"], "error: no such config file: gone.yaml"),
        (["--config-file", "{birds}/config.yaml", "--weights", "gone.pth"], "gone.pth"),
        (["--max-megabytes", "0"], "--max-megabytes: '0' is no number above 0"),
        (["--max-megapixels", "many"], "--max-megapixels: 'many' is no number above 0"),
        (
            ["--config-file", "{birds}/config.yaml", "--weights", "{birds}/weights.pth"]
            + ["--examples", "nowhere"],
            "error: --examples nowhere: no such image, or folder without images",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, birds, arguments, message):
    code, err = fails(capsys, *(argument.format(birds=birds) for argument in arguments))
    assert code == 2 and message in err and "Traceback" not in err


def test_a_package_that_is_missing_is_named(capsys, birds, monkeypatch):
    monkeypatch.setitem(sys.modules, "waitress", None)
    code, err = fails(capsys, "--config-file", birds / "config.yaml")
    assert (code, err) == (2, "error: waitress is missing: pip install -e '.[web]'\n")


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1, port {port}: it is in use: give another"):
            command.make_server(lambda *_: [], "127.0.0.1", port, Limits())
    with pytest.raises(UserError, match="cannot listen on no.such.host.invalid, port 1"):
        command.make_server(lambda *_: [], "no.such.host.invalid", 1, Limits())


@pytest.mark.parametrize(
    "host, url, warned",
    [
        ("127.0.0.1", "http://127.0.0.1:8000 ", False),
        ("0.0.0.0", "http://0.0.0.0:8000 ", True),
        ("::1", "http://[::1]:8000 ", False),
    ],
)
def test_hosts_get_a_url_and_a_warning(monkeypatch, birds, caplog, host, url, warned):
    caplog.set_level("INFO", "lsnet_d2.webpage")

    class Server:
        effective_host, effective_port = host, 8000

        def run(self):
            pass

    hosts = []
    monkeypatch.setattr(
        command, "make_server", lambda app, host, *_: hosts.append(host) or Server()
    )
    options = ["--config-file", birds / "config.yaml", "--weights", birds / "weights.pth"]
    main([str(option) for option in [*options, "--host", host]])
    assert hosts == [host]
    assert f"The page is at {url}" in caplog.text
    assert ("Anybody who reaches 0.0.0.0 can use this page" in caplog.text) == warned


def test_examples_of_files_and_folders(birds, tmp_path, caplog):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    found = find_examples([str(broken), str(birds / "val" / "002.jpg"), str(birds / "val")], None)
    assert [example.path.name for example in found] == ["002.jpg", "000.jpg", "001.jpg", "002.jpg"]
    assert "broken.jpg: not a complete image file" in caplog.text
    assert find_examples(None, None) == []
    with pytest.raises(UserError, match="nowhere: no such image"):
        find_examples(["nowhere"], None)


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(birds):
    options = ["--config-file", birds / "config.yaml", "--weights", birds / "weights.pth"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lsnet_d2.webpage", *options, "--port", "0"],
        cwd=birds,
        env={**tool_environment(), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            address = re.search(r"http://127.0.0.1:\d+", line)
            if address:
                break
        else:
            raise AssertionError("".join(lines))
        with urllib.request.urlopen(address.group(), timeout=30) as response:
            assert b"Drop a photo here" in response.read()
        process.send_signal(2)  # Ctrl-C
        rest = process.communicate(timeout=30)[0]
        assert process.returncode == 0 and "Traceback" not in rest
    finally:
        process.kill()


@pytest.mark.slow
def test_the_package_has_the_command_and_the_files_of_the_page(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "lsnet_d2", source / "lsnet_d2", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", *options, str(source)],
        check=True,
        env=dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1"),
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        entries = next(name for name in names if name.endswith("entry_points.txt"))
        assert b"lsnet-demo = lsnet_d2.webpage.__main__:main" in wheel.read(entries)
        for name in ("static/page.js", "static/page.css", "templates/index.html"):
            assert f"lsnet_d2/webpage/{name}" in names
