"""What the figures of a run depend on besides its config: code, libraries, device."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Version:
    """
    Attributes:
        code: hash of the package's files and of what trains with them.
        torch, detectron2: versions of the libraries.
        device: by its name, as in "NVIDIA H100" or a CPU with its number of cores.
        commit: of git, with "+" where files differ from it; empty outside of a checkout. It has
            no part in :attr:`key`: two commits may have the same code.
    """

    code: str
    torch: str
    detectron2: str
    device: str
    commit: str

    @property
    def key(self) -> str:
        """Name of what may stand in one table."""
        parts = asdict(self)
        del parts["commit"]
        return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:10]


def current_version(device: str) -> Version:
    """
    Args:
        device: of torch, one that exists.
    """
    return Version(
        code=code_hash(),
        torch=torch.__version__,
        detectron2=_detectron2(),
        device=device_name(device),
        commit=commit(),
    )


def code_hash() -> str:
    """Of what a training runs: the package, and the script here that starts it."""
    files = [*(ROOT / "lsnet_d2").rglob("*.py"), Path(__file__).with_name("train.py")]
    return hash_files(files)


def hash_files(files: Iterable[Path]) -> str:
    """Of names below the checkout and contents."""
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{os.path.relpath(file, ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def commit() -> str:
    """See :class:`Version`."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=10", "HEAD")
    if not head:
        return ""
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type != "cpu":
        return device
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _detectron2() -> str:
    import detectron2

    for name in ("detectron2", "sal-detectron2"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return detectron2.__version__
