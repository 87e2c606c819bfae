"""The set-up program with pip and the interpreters replaced by fakes: no network, no real .venv."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)

SetupError = setup_env.SetupError


class FakeEnvironment(setup_env.Environment):
    """Records commands instead of running them; `fail` maps a word of a command to its output."""

    def __init__(self, root, **kwargs):
        super().__init__(root, root / ".venv", **kwargs)
        self.commands = []
        self.fail = {}

    def call(self, command):
        self.commands.append(command)
        for word, output in self.fail.items():
            if any(word in part for part in command):
                return 1, output
        if "venv" in command:
            self.python.parent.mkdir(parents=True)
            self.python.write_text("")
        if "--target" in command:
            install_fake_wheel(Path(command[command.index("--target") + 1]))
        if "uninstall" in command:
            shutil.rmtree(self.site_packages / "d2-1.dist-info", ignore_errors=True)
        if "sysconfig" in command[-1]:
            self.site_packages.mkdir(exist_ok=True)
            return 0, str(self.site_packages)
        return 0, "torch 1\ndetectron2 2\nlsnet_d2 3"

    @property
    def site_packages(self):
        return self.venv / "site-packages"

    def pip_calls(self):
        return [command[3] for command in self.commands if command[1:3] == ["-m", "pip"]]


def install_fake_wheel(folder):
    files = ["detectron2/__init__.py", "detectron2/_C.cpython-310-x86_64-linux-gnu.so"]
    files += ["tools/train_net.py", "d2-1.dist-info/METADATA"]
    record = folder / "d2-1.dist-info" / "RECORD"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    record.write_text("".join(f"{name},sha256=x,0\n" for name in [*files, record.name]))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "requirements").mkdir()
    for name in setup_env.INPUTS:
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


@pytest.fixture
def env(root, monkeypatch):
    """A fake environment on a fake Python 3.11 that lacks nothing once it was made."""
    env = FakeEnvironment(root)

    def probe(python):
        if python == str(env.python) and not env.python.exists():
            return None
        return "CPython", (3, 11, 4), []

    monkeypatch.setattr(setup_env, "probe_python", probe)
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: name)
    monkeypatch.setattr(setup_env, "check_space", lambda folder, needed_gb: None)
    return env


def run(env, detectron2=None, python=None, force=False):
    env.commands.clear()
    return setup_env.set_up(env, detectron2, python, force)


def test_first_run_makes_and_second_does_nothing(env, capsys):
    assert run(env) is True
    assert env.pip_calls() == ["install", "install", "install", "uninstall"]
    state = setup_env.read_state(env.venv)
    assert (state["state"], state["detectron2"], state["python"]) == ("ready", "default", "3.11")
    capsys.readouterr()

    assert run(env) is False
    assert env.commands == []
    assert "up to date" in capsys.readouterr().out
    env.quiet = True
    assert run(env) is False
    assert capsys.readouterr().out == ""


def test_wheel_is_checked_by_hash_and_pruned(env):
    run(env)
    command = next(command for command in env.commands if "--target" in command)
    assert "--require-hashes" in command
    assert "--no-deps" in command
    assert sorted(path.name for path in env.site_packages.iterdir()) == [
        "d2-1.dist-info",
        "detectron2",
    ]
    assert [path.name for path in (env.site_packages / "detectron2").iterdir()] == ["__init__.py"]
    record = (env.site_packages / "d2-1.dist-info" / "RECORD").read_text()
    assert record.splitlines() == [
        "detectron2/__init__.py,sha256=x,0",
        "d2-1.dist-info/METADATA,sha256=x,0",
        "RECORD,sha256=x,0",
    ]
    assert not (env.venv / "staging").exists()


@pytest.mark.parametrize("name", setup_env.INPUTS)
def test_changed_requirements_are_installed_into_what_is_there(env, root, name):
    run(env)
    (root / name).write_text("changed")
    assert run(env) is True
    assert not any("venv" in command for command in env.commands)
    assert run(env) is False


def test_choice_of_detectron2_stays_until_another_is_made(env, root):
    run(env, "git+https://example.org/d2")
    assert env.commands[-2][-1] == "git+https://example.org/d2"
    assert "--no-build-isolation" in env.commands[-2]
    assert run(env) is False

    source = root / "d2"
    source.mkdir()
    (source / "setup.py").write_text("")
    assert run(env, setup_env.normalize_detectron2(str(source))) is True
    removed, _, installed = env.commands[-4:-1]
    assert removed[3:] == ["uninstall", "-y", "sal-detectron2", "detectron2"]
    assert installed[-1] == str(env.venv / "staging")  # a copy: the folder of the user stays clean
    assert setup_env.read_state(env.venv)["detectron2"] == str(source)

    assert run(env, "default") is True
    assert any("--require-hashes" in command for command in env.commands)
    assert run(env) is False


@pytest.mark.parametrize("word", ["setuptools", "[dev]", "--target", "uninstall", "check_env.py"])
def test_failed_step_is_repeated_by_the_next_run(env, word):
    env.fail = {word: "ERROR: something odd"}
    with pytest.raises(SetupError, match="something odd"):
        run(env)
    assert setup_env.read_state(env.venv)["state"] == "incomplete"
    env.fail = {}
    assert run(env) is True
    assert not any("venv" in command for command in env.commands)  # what is there was kept
    assert run(env) is False


def test_failure_in_a_ready_environment_withdraws_the_stamp(env):
    run(env)
    env.fail = {"uninstall": "ERROR: odd"}
    with pytest.raises(SetupError):
        run(env, "other-detectron2")
    state = setup_env.read_state(env.venv)
    assert state["state"] == "incomplete"
    assert "key" not in state


def test_killed_run_is_not_trusted(env, monkeypatch):
    run(env)

    def die(choice):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(env, "install_detectron2", die)
        with pytest.raises(KeyboardInterrupt):
            run(env, "other-detectron2")
    assert setup_env.read_state(env.venv)["state"] == "running"
    (env.venv / "half-installed").mkdir()
    assert run(env) is True
    assert env.commands[0][1:3] == ["-m", "venv"]
    assert not (env.venv / "half-installed").exists()


def test_unreadable_state_and_broken_python_mean_a_new_environment(env):
    run(env)
    (env.venv / setup_env.STATE_FILE).write_text('{"state": "rea')
    assert run(env) is True
    assert env.commands[0][1:3] == ["-m", "venv"]
    env.python.unlink()
    assert run(env) is True
    assert env.commands[0][1:3] == ["-m", "venv"]
    assert run(env, force=True) is True
    assert env.commands[0][1:3] == ["-m", "venv"]


def test_foreign_environment_is_left_alone(env):
    env.venv.mkdir()
    (env.venv / "pyvenv.cfg").write_text("mine")
    with pytest.raises(SetupError, match="not made by this program"):
        run(env)
    assert [path.name for path in env.venv.iterdir()] == ["pyvenv.cfg"]
    assert env.commands == []


def test_another_python_is_asked_for(env, monkeypatch):
    run(env)
    assert run(env, python="python3.11") is False
    monkeypatch.setattr(setup_env, "find_python", lambda wanted: (wanted, "3.12"))
    assert run(env, python="python3.12") is True
    assert env.commands[0] == ["python3.12", "-m", "venv", str(env.venv)]


@pytest.mark.parametrize(
    ("state", "missing", "action"),
    [
        (None, None, "create"),
        ({}, [], "create"),
        ({"state": "running"}, [], "create"),
        ({"state": "ready", "key": "k"}, None, "create"),
        ({"state": "ready", "key": "k"}, ["pip"], "create"),
        ({"state": "incomplete"}, ["pip"], "create"),
        ({"state": "incomplete"}, [], "repair"),
        ({"state": "ready", "key": "k"}, ["torch"], "repair"),
        ({"state": "ready", "key": "other"}, [], "repair"),
        ({"state": "ready"}, [], "repair"),
        ({"state": "ready", "key": "k"}, [], "nothing"),
    ],
)
def test_diagnose(state, missing, action):
    assert setup_env.diagnose(state, missing, "k")[0] == action


def test_key_depends_on_everything(root):
    keys = {setup_env.make_key(root, "3.11", "default")}
    keys.add(setup_env.make_key(root, "3.12", "default"))
    keys.add(setup_env.make_key(root, "3.11", "other"))
    for name in setup_env.INPUTS:
        (root / name).write_text("changed")
        keys.add(setup_env.make_key(root, "3.11", "default"))
    assert len(keys) == 6
    assert setup_env.make_key(root, "3.11", "default") in keys


def test_normalize_detectron2(tmp_path, monkeypatch):
    (tmp_path / "d2").mkdir()
    (tmp_path / "d2" / "setup.py").write_text("")
    (tmp_path / "d2.whl").write_text("")
    monkeypatch.chdir(tmp_path)
    folder, wheel = str((tmp_path / "d2").resolve()), str((tmp_path / "d2.whl").resolve())
    url = "https://example.org/d2"
    expected = {
        "": "default",
        " default ": "default",
        "d2": folder,
        "./d2": folder,
        "d2.whl": wheel,
        url: "git+" + url,
        url + ".git@main": "git+" + url + ".git@main",
        url + "/a.whl": url + "/a.whl",
        url + "/a.tar.gz#sha256=1": url + "/a.tar.gz#sha256=1",
        "git+" + url: "git+" + url,
        "detectron2 @ " + url: "detectron2 @ " + url,
        "detectron2==0.6": "detectron2==0.6",
    }
    assert {value: setup_env.normalize_detectron2(value) for value in expected} == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("./missing", "no such file or folder"),
        ("/missing/d2", "no such file or folder"),
        (".", "neither setup.py nor pyproject.toml"),
        ("-e x", "is an option"),
    ],
)
def test_normalize_detectron2_refuses(value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match=message):
        setup_env.normalize_detectron2(value)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "WARNING: Retrying ... Failed to establish a new connection: [Errno 111]\n"
            "ERROR: No matching distribution found for torch",
            "no network",
        ),
        ("fatal: unable to access: Could not resolve host: example.org", "no network"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "no disk space"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS", "hash mismatch"),
        ("ERROR: No matching distribution found for torch==9", "not on the package index"),
        ("ERROR: ResolutionImpossible", "conflicting versions"),
        ("ERROR: Failed building wheel for detectron2", "C\\+\\+ compiler"),
        ("a\nERROR: first\nERROR: last", "step: ERROR: last$"),
        ("", "failed without a message"),
    ],
)
def test_explain(output, message):
    with pytest.raises(SetupError, match=message) as caught:
        raise SetupError(setup_env.explain(output, "step"))
    assert "\n" not in str(caught.value)


def test_explain_import():
    output = "warning\nFAILED import cv2: ImportError: libGL.so.1\n"
    assert setup_env.explain_import(output).endswith("import cv2: ImportError: libGL.so.1")
    assert setup_env.explain_import("Traceback\nValueError: x\n").endswith("ValueError: x")


def test_old_and_missing_pythons_are_refused(monkeypatch):
    versions = {"old": ("CPython", (3, 9, 1), []), "pypy": ("PyPy", (3, 11, 0), [])}
    versions["new"] = ("CPython", (3, 10, 0), [])
    monkeypatch.setattr(setup_env, "probe_python", versions.get)
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: name if name in versions else None)
    assert setup_env.find_python("new") == ("new", "3.10")
    for wanted, message in [("old", "CPython 3.9.1"), ("pypy", "PyPy"), ("none", "does not run")]:
        with pytest.raises(SetupError, match="wrong Python: .*" + message):
            setup_env.find_python(wanted)
    monkeypatch.setattr(setup_env, "PYTHONS", ("none", "old", "new"))
    assert setup_env.find_python(None) == ("new", "3.10")
    monkeypatch.setattr(setup_env, "PYTHONS", ("none", "old"))
    with pytest.raises(SetupError, match="3.10 or newer is needed, old is CPython 3.9.1"):
        setup_env.find_python(None)


def test_space_is_checked_before_anything_is_made(root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda folder: usage(9e9, 8e9, 1e9))
    setup_env.check_space(root, 1.0)
    env = FakeEnvironment(root)
    monkeypatch.setattr(setup_env, "probe_python", lambda python: None)
    monkeypatch.setattr(setup_env, "find_python", lambda wanted: ("python3", "3.11"))
    with pytest.raises(SetupError, match="has 1.0 GB free, 7.0 GB are needed"):
        run(env)
    assert not env.venv.exists()


def test_main_reports_one_line(root, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, "ROOT", root)
    monkeypatch.setenv("DETECTRON2", "./missing")
    assert setup_env.main([]) == 1
    error = capsys.readouterr().err
    assert error == "[setup] FAILED: DETECTRON2=./missing: no such file or folder\n"
    assert not (root / ".venv").exists()


def test_variables_that_redirect_pip_are_dropped(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "x")
    monkeypatch.setenv("PIP_TARGET", "x")
    monkeypatch.setenv("PIP_INDEX_URL", "http://localhost")
    environ = setup_env.clean_environ()
    assert "PYTHONPATH" not in environ
    assert "PIP_TARGET" not in environ
    assert environ["PIP_INDEX_URL"] == "http://localhost"


def test_second_run_waits_for_the_first(root):
    if setup_env.fcntl is None:
        pytest.skip("no file locks on this system")
    holder = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", holder, str(root / ".venv.lock")]
    with FakeEnvironment(root).locked():
        assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0
    assert subprocess.run(command).returncode == 0


def test_real_call_logs_and_probe_reads_this_python(root):
    env = setup_env.Environment(root, root / ".venv")
    env.venv.mkdir()
    code, output = env.call([sys.executable, "-c", "print('Downloading x (9 MB)'); exit(3)"])
    assert (code, output) == (3, "Downloading x (9 MB)")
    assert "Downloading x" in (env.venv / setup_env.LOG_FILE).read_text()
    implementation, version, _ = setup_env.probe_python(sys.executable)
    assert (implementation, version) == ("CPython", tuple(sys.version_info[:3]))
    assert setup_env.probe_python(str(root / "none")) is None


def test_state_file_is_json_and_replaced_whole(root):
    setup_env.write_state(root, {"state": "running"})
    setup_env.write_state(root, {"state": "ready"})
    assert json.loads((root / setup_env.STATE_FILE).read_text()) == {"state": "ready"}
    assert not list(root.glob("*.tmp"))
    assert setup_env.read_state(root / "none") is None
