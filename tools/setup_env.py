"""Make the project's environment: .venv with the tested packages, Detectron2 and this checkout.

    python3 tools/setup_env.py [--detectron2 WHAT] [--python PYTHON] [--force] [--quiet]

A state file inside .venv says how far a run came. "ready" is written last, after everything was
imported once, with a key of all that went into the environment: a run that finds its own key has
nothing to do. "incomplete" means that a step reported a failure, and the next run repeats the
steps. "running" at the start of a run means that the one before was killed; then nothing in .venv
is trusted and it is made anew. A .venv without a state file is somebody else's and not touched.

Standard library only, and readable by Python 3.6, so that an old Python is told what it is.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

try:
    import fcntl
except ImportError:  # Windows: two runs at once are not kept apart there
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
STATE_FILE = "lsnet_d2-setup.json"
LOG_FILE = "lsnet_d2-setup.log"
INPUTS = ("setup.py", "requirements/constraints.txt", "requirements/detectron2.txt")

OLDEST_PYTHON = (3, 10)
# The first one found is taken; the tests ran on 3.11 and 3.10.
PYTHONS = ("python3.11", sys.executable, "python3.10", "python3.12", "python3.13", "python3.14")
NEW_ENVIRONMENT_GB = 7.0  # torch with its CUDA libraries takes 5, the rest 1
REPAIR_GB = 1.0

DEFAULT = "default"
ARCHIVES = (".whl", ".zip", ".tar.gz", ".tar.bz2")
DETECTRON2_NAMES = ("sal-detectron2", "detectron2")
# The wheel is tagged for CPython 3.10 because of its compiled part, which is left out.
DETECTRON2_WHEEL = ["--no-deps", "--require-hashes", "--no-compile", "--only-binary=:all:"]
DETECTRON2_WHEEL += ["--python-version", "3.10", "--implementation", "cp"]
DETECTRON2_WHEEL += ["--abi", "none", "--platform", "any"]

PROBE = """
import importlib.util, json, platform, sys
names = ["pip", "torch", "torchvision", "detectron2", "lsnet_d2"]
missing = [name for name in names if importlib.util.find_spec(name) is None]
print(json.dumps([platform.python_implementation(), list(sys.version_info[:3]), missing]))
"""

# What pip prints, and what that means to the person who ran the set-up; the first match counts.
REASONS = (
    (
        ("DO NOT MATCH THE HASHES",),
        "hash mismatch: what the index served is not the tested file; nothing of it was installed",
    ),
    (
        ("No space left on device", "Errno 28", "Disk quota exceeded"),
        "no disk space: free some, also where pip's cache and TMPDIR are, and run it again",
    ),
    (
        (
            "Failed to establish a new connection",
            "Name or service not known",
            "name resolution",
            "Network is unreachable",
            "Connection refused",
            "ConnectTimeoutError",
            "ReadTimeoutError",
            "Read timed out",
            "ProxyError",
            "Could not resolve host",
            "Could not fetch URL",
            "Max retries exceeded",
        ),
        "no network: the package index or the repository could not be reached; run it again later",
    ),
    (
        ("ResolutionImpossible", "conflicting dependencies"),
        "conflicting versions: it does not fit requirements/constraints.txt",
    ),
    (
        ("No matching distribution found", "Could not find a version"),
        "not on the package index for this Python and system",
    ),
    (("Repository not found", "does not appear to be a git repository"), "no such git repository"),
    (
        ("Failed building", "Failed to build", "subprocess-exited-with-error"),
        "building it failed; Detectron2 from source needs a C++ compiler that fits this torch",
    ),
)


class SetupError(Exception):
    """Ends the set-up with one line for the person who ran it."""


class StepError(SetupError):
    """A step failed whose whole output is in the log."""


def normalize_detectron2(value: str) -> str:
    """A choice as pip takes it: "default", an absolute path, a URL or a requirement.

    Raises:
        SetupError: it is an option or a path where no Detectron2 is.
    """
    value = value.strip()
    if value in ("", DEFAULT):
        return DEFAULT
    if value.startswith("-"):
        raise SetupError(f"DETECTRON2={value} is an option, not a path, URL or requirement")
    if "://" in value:
        is_repository = value.startswith(("http", "ssh")) and " @ " not in value
        if is_repository and not value.split("#")[0].endswith(ARCHIVES):
            return "git+" + value
        return value
    path = Path(value).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("setup.py", "pyproject.toml")):
            raise SetupError(f"DETECTRON2={value} has neither setup.py nor pyproject.toml")
        return str(path.resolve())
    if path.is_file():
        return str(path.resolve())
    if os.sep in value or value.startswith(("~", ".")):
        raise SetupError(f"DETECTRON2={value}: no such file or folder")
    return value


def make_key(root: Path, python: str, detectron2: str) -> str:
    """Digest of all that decides what is in the environment."""
    digest = hashlib.sha256()
    for part in (python, detectron2, str(root)):
        digest.update(part.encode() + b"\0")
    for name in INPUTS:
        digest.update((root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def read_state(venv: Path) -> Optional[Dict[str, str]]:
    """The state file; None where there is none, {} where it cannot be understood."""
    try:
        state = json.loads((venv / STATE_FILE).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def write_state(venv: Path, state: Dict[str, str]) -> None:
    """Replace the state file in one step."""
    temporary = venv / (STATE_FILE + ".tmp")
    with open(str(temporary), "w") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(str(temporary), str(venv / STATE_FILE))


def explain(output: str, step: str) -> str:
    """One line on why a step failed, from what pip printed."""
    for patterns, reason in REASONS:
        if any(pattern in output for pattern in patterns):
            return f"{step}: {reason}"
    errors = [line.strip() for line in output.splitlines() if "ERROR" in line or "error:" in line]
    return f"{step}: {errors[-1] if errors else 'failed without a message'}"


def explain_import(output: str) -> str:
    """One line on why the finished environment was not accepted, from what check_env.py printed."""
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    failed = [line[len("FAILED ") :] for line in lines if line.startswith("FAILED ")]
    return f"the environment does not work: {(failed or lines)[-1]}"


def prune_wheel(folder: Path) -> None:
    """Take out of the unpacked Detectron2 wheel what must not be installed, and its records of it.

    Its top-level package `tools` would hide the project's folder of that name, and its `_C` was
    compiled against another torch and CUDA.
    """
    shutil.rmtree(str(folder / "tools"), ignore_errors=True)
    for path in folder.glob("detectron2/_C*"):
        path.unlink()
    for record in folder.glob("*.dist-info/RECORD"):
        with open(str(record), newline="") as file:
            rows = list(csv.reader(file))
        with open(str(record), "w", newline="") as file:
            unwanted = ("tools/", "detectron2/_C")
            rows = [row for row in rows if row and not row[0].startswith(unwanted)]
            csv.writer(file, lineterminator="\n").writerows(rows)


def check_space(folder: Path, needed_gb: float) -> None:
    """Raise SetupError unless the file system of `folder` has so much room."""
    free_gb = shutil.disk_usage(str(folder)).free / 1e9
    if free_gb < needed_gb:
        raise SetupError(
            f"no disk space: {folder} has {free_gb:.1f} GB free, {needed_gb:.1f} GB are needed"
        )


def clean_environ() -> Dict[str, str]:
    """The environment variables for pip, without those that would redirect it."""
    unwanted = (
        "PYTHONPATH",
        "PYTHONHOME",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_USER",
        "PIP_REQUIRE_HASHES",
    )
    environ = {key: value for key, value in os.environ.items() if key not in unwanted}
    environ.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", GIT_TERMINAL_PROMPT="0")
    return environ


def probe_python(python: str) -> Optional[Tuple[str, Tuple[int, ...], List[str]]]:
    """Implementation, version and missing packages of an interpreter; None if it does not run."""
    try:
        output = subprocess.check_output(
            [python, "-I", "-c", PROBE], stderr=subprocess.DEVNULL, env=clean_environ()
        )
        implementation, version, missing = json.loads(output.decode())
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return implementation, tuple(version), missing


def find_python(wanted: Optional[str]) -> Tuple[str, str]:
    """Path and version ("3.11") of the Python to build on.

    Raises:
        SetupError: the wanted one, or every one found, is not CPython 3.10 or newer.
    """
    oldest = ".".join(map(str, OLDEST_PYTHON))
    seen = []
    for name in [wanted] if wanted else PYTHONS:
        path = shutil.which(name)
        found = probe_python(path) if path else None
        if not found:
            continue
        if found[0] == "CPython" and found[1] >= OLDEST_PYTHON:
            return path, "{}.{}".format(*found[1])
        seen.append("{} is {} {}".format(name, found[0], ".".join(map(str, found[1]))))
    if wanted and not seen:
        raise SetupError(f"wrong Python: {wanted} does not run")
    raise SetupError(f"wrong Python: CPython {oldest} or newer is needed, {', '.join(seen)}")


class Environment:
    """One virtual environment and the steps that fill it."""

    def __init__(self, root: Path, venv: Path, quiet: bool = False) -> None:
        self.root = root
        self.venv = venv
        self.quiet = quiet
        self.lock_fds = ()  # type: Tuple[int, ...]
        self.python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.constraints = str(root / "requirements" / "constraints.txt")

    def say(self, message: str) -> None:
        print(f"[setup] {message}", flush=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out, also while a pip lives on after its run was killed."""
        if fcntl is None:
            yield
            return
        with open(str(self.venv) + ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.say("waiting for another set-up of this checkout to end")
                fcntl.flock(file, fcntl.LOCK_EX)
            self.lock_fds = (file.fileno(),)
            yield

    def call(self, command: List[str]) -> Tuple[int, str]:
        """Run a command; its output goes to the log, pip's headlines to the screen."""
        lines = []
        with open(str(self.venv / LOG_FILE), "a") as log:
            log.write("$ " + " ".join(command) + "\n")
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=str(self.venv),
                env=clean_environ(),
                pass_fds=self.lock_fds,
            )
            for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip()
                log.write(line + "\n")
                log.flush()
                lines.append(line)
                headline = line.strip().startswith(("Downloading ", "Building ", "Cloning "))
                if headline and not line.endswith("kB)"):
                    self.say("  " + line.strip()[:100])
            return process.wait(), "\n".join(lines)

    def pip(self, step: str, arguments: List[str]) -> None:
        code, output = self.call([str(self.python), "-m", "pip"] + arguments)
        if code:
            raise StepError(explain(output, step))

    def create(self, base_python: str) -> None:
        """An empty environment in place of whatever is there; the state file stays."""
        for entry in self.venv.iterdir():
            if entry.name != STATE_FILE:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(str(entry))
                else:
                    entry.unlink()
        code, output = self.call([base_python, "-m", "venv", str(self.venv)])
        if code and "ensurepip" in output:
            raise SetupError(
                f"{base_python} has no ensurepip (Debian: apt-get install python3-venv)"
            )
        if code:
            raise StepError(explain(output, f"{base_python} -m venv"))

    def install_packages(self) -> None:
        tools = ["pip", "setuptools", "wheel"]
        self.pip("pip and setuptools", ["install", "-c", self.constraints, *tools])
        # setuptools was just installed in the tested version: no second one for the build.
        arguments = ["install", "--no-build-isolation", "-c", self.constraints]
        self.pip("packages", [*arguments, "-e", f"{self.root}[dev]"])

    def install_detectron2(self, choice: str) -> None:
        staging = self.venv / "staging"
        shutil.rmtree(str(staging), ignore_errors=True)
        if choice == DEFAULT:
            requirements = str(self.root / "requirements" / "detectron2.txt")
            arguments = ["install", *DETECTRON2_WHEEL, "--target", str(staging), "-r", requirements]
            self.pip("Detectron2", arguments)
            prune_wheel(staging)
            site_packages = self.remove_detectron2()
            for entry in staging.iterdir():
                os.replace(str(entry), str(site_packages / entry.name))
        else:
            if Path(choice).is_dir():  # a build leaves files in its folder: not in the user's
                ignore = shutil.ignore_patterns(".git", "build", "*.egg-info", "*.so")
                shutil.copytree(choice, str(staging), symlinks=True, ignore=ignore)
                choice = str(staging)
            self.remove_detectron2()
            arguments = [
                "install",
                "--no-build-isolation",
                "--no-cache-dir",
                "-c",
                self.constraints,
            ]
            self.pip("Detectron2", [*arguments, choice])
        shutil.rmtree(str(staging), ignore_errors=True)

    def remove_detectron2(self) -> Path:
        """Uninstall whichever Detectron2 is there; returns the folder of installed packages."""
        self.pip("removing the previous Detectron2", ["uninstall", "-y", *DETECTRON2_NAMES])
        program = "import sysconfig; print(sysconfig.get_path('purelib'))"
        code, output = self.call([str(self.python), "-I", "-c", program])
        if code:
            raise StepError(explain(output, "removing the previous Detectron2"))
        site_packages = Path(output.strip())
        shutil.rmtree(str(site_packages / "detectron2"), ignore_errors=True)  # what pip left over
        return site_packages

    def check(self) -> None:
        """Import everything once and show the versions."""
        script = str(self.root / "tools" / "check_env.py")
        code, output = self.call([str(self.python), "-I", script])
        if code:
            raise StepError(explain_import(output))
        for line in output.splitlines()[-3:]:
            self.say(line)


def diagnose(
    state: Optional[Dict[str, str]], missing: Optional[List[str]], key: str
) -> Tuple[str, str]:
    """What is to be done, and why.

    Args:
        state: content of the state file, None where there is no environment.
        missing: packages that the environment lacks; None if its Python does not run.
        key: of the environment that is wanted.

    Returns:
        "create" (anew), "repair" (repeat all steps in what is there) or "nothing"; the reason.
    """
    if state is None:
        return "create", "there is none"
    if missing is None or "pip" in missing:
        return "create", "the one that is there is broken"
    if state.get("state") == "incomplete":
        return "repair", "the run before failed"
    if state.get("state") != "ready":
        return "create", "the run before was interrupted"
    if missing:
        return "repair", "it lacks " + ", ".join(missing)
    if state.get("key") != key:
        return "repair", "the requirements, the choice of Detectron2 or the folder changed"
    return "nothing", ""


def set_up(env: Environment, detectron2: Optional[str], python: Optional[str], force: bool) -> bool:
    """Bring the environment up to date; returns whether there was anything to do.

    Args:
        env: where.
        detectron2: normalized choice; None keeps the one that is there, the default one at first.
        python: interpreter to build on; None keeps the one that is there, or picks one.
        force: make it anew in any case.

    Raises:
        SetupError: a step failed. The environment is then marked as not ready.
    """
    state = read_state(env.venv)
    if state is None and env.venv.exists() and any(env.venv.iterdir()):
        raise SetupError(f"{env.venv} was not made by this program: move it away or remove it")
    choice = detectron2 or (state or {}).get("detectron2", DEFAULT)
    base = find_python(python) if python else None
    found = probe_python(str(env.python))
    version = "{}.{}".format(*found[1]) if found else ""
    missing = found[2] if found else None

    action, reason = diagnose(state, missing, make_key(env.root, version, choice))
    if force:
        action, reason = "create", "asked for"
    elif found and base and base[1] != version:
        action, reason = "create", f"Python {base[1]} instead of {version}"
    if action == "nothing":
        if not env.quiet:
            env.say(f"up to date: Python {version}, Detectron2: {choice}")
        return False

    if action == "create":
        base = base or find_python(None)
        version = base[1]
    has_torch = action == "repair" and "torch" not in missing
    check_space(env.root, REPAIR_GB if has_torch else NEW_ENVIRONMENT_GB)

    env.venv.mkdir(parents=True, exist_ok=True)
    state = {"state": "running", "detectron2": choice, "python": version}
    write_state(env.venv, state)
    try:
        if action == "create":
            env.say(f"making {env.venv} with {base[0]}, Python {version} ({reason})")
            env.create(base[0])
        else:
            env.say(f"bringing {env.venv} up to date ({reason})")
        env.say("installing packages; the first time this fetches 3 GB and takes minutes")
        env.install_packages()
        env.say(f"installing Detectron2: {choice}")
        env.install_detectron2(choice)
        env.check()
    except SetupError:
        write_state(env.venv, dict(state, state="incomplete"))
        raise
    key = make_key(env.root, version, choice)
    write_state(env.venv, dict(state, state="ready", key=key))
    env.say(f"done: {env.venv}")
    return True


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Make the project's environment in .venv.")
    parser.add_argument(
        "--detectron2",
        default=os.environ.get("DETECTRON2"),
        metavar="WHAT",
        help="path, URL or requirement, or 'default' (also from $DETECTRON2); left out: keep the"
        " one that is installed",
    )
    parser.add_argument(
        "--python", metavar="PYTHON", help="interpreter to build on (3.10 or newer)"
    )
    parser.add_argument("--force", action="store_true", help="make the environment anew")
    parser.add_argument("--quiet", action="store_true", help="say nothing when it is up to date")
    options = parser.parse_args(arguments)
    env = Environment(ROOT, ROOT / ".venv", quiet=options.quiet)
    try:
        detectron2 = normalize_detectron2(options.detectron2) if options.detectron2 else None
        with env.locked():
            set_up(env, detectron2, options.python, options.force)
    except SetupError as error:
        print(f"[setup] FAILED: {error}", file=sys.stderr)
        if isinstance(error, StepError):
            print(f"[setup] full output: {env.venv / LOG_FILE}", file=sys.stderr)
        return 1
    except OSError as error:  # no space left, no permission: the next run makes it anew
        print(f"[setup] FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("[setup] interrupted; the next run makes the environment anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
