import os
import shutil
import subprocess

import pytest
from tiny_coco import ROOT


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    "variables, folder", [([], "output/demo"), (["TASK=joint"], "output/demo_joint")]
)
def test_the_demo_draws_what_it_has_trained(variables, folder):
    command = ["make", "-n", "demo", "PYTHON=python", "ARGS=--resume SEED 3", *variables]
    # the variables of the make that runs the tests are not meant for this one
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=env
    ).stdout
    training, drawing = printed.replace("\\\n", " ").splitlines()
    # options of the tool come before the keys of the config
    assert training.endswith(f" --resume SEED 3 OUTPUT_DIR {folder}")
    words = training.split()
    assert (ROOT / words[words.index("--config-file") + 1]).is_file()
    words = drawing.split()
    results = words[words.index("--predictions") + 1]
    assert results == f"{folder}/inference/coco_instances_results.json"
    assert words[words.index("--output-dir") + 1] == f"{folder}/pictures"
