"""Import what the project stands on and print the versions: the end of the set-up, the start of a
bug report.

    python tools/check_env.py
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType

IMPORTS = ("cv2", "pycocotools.mask", "detectron2.engine", "detectron2.model_zoo", "lsnet_d2")


def load(name: str) -> ModuleType:
    """Import a module, or end the program with one line on why it cannot be."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        reason = f"import {name}: {type(error).__name__}: {error}"
        if "libGL" in reason or "libgthread" in reason:
            reason += " (OpenCV needs them; Debian: apt-get install libgl1 libglib2.0-0)"
        sys.exit(f"FAILED {reason}")


def main() -> None:
    torch, torchvision, _ = load("torch"), load("torchvision"), load("detectron2")
    for name in IMPORTS:
        load(name)
    compiled = importlib.util.find_spec("detectron2._C") is not None
    if compiled:
        load("detectron2._C")

    versions = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    name = next(
        (name for name in ("detectron2", "sal-detectron2") if name in versions), "detectron2"
    )
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(
        f"Python {sys.version.split()[0]}, lsnet_d2 {versions.get('lsnet_d2', '(not installed)')}"
    )
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, CUDA device: {cuda}")
    print(
        f"{name} {versions.get(name, '(on the path)')},"
        f" compiled operators: {'yes' if compiled else 'no'}"
    )


if __name__ == "__main__":
    main()
