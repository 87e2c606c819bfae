import re

import pytest
import torch
from tiny_coco import ROOT, run_tool, run_tool_here, write_config

from lsnet_d2.analysis import count_flops
from lsnet_d2.config_file import load_config
from lsnet_d2.engine import LSNetTrainer

ZOO = ROOT / "docs" / "model_zoo.md"
ROW = re.compile(r"^\| \[(?P<name>[^\]]+)\]\((?P<path>[^)]+)\) \|(?P<cells>.*)\|$", re.MULTILINE)


def zoo_rows():
    """(name, path from docs/, parameters in millions, multiply-adds in billions) of the page."""
    rows = []
    for row in ROW.finditer(ZOO.read_text()):
        *_, parameters, flops = (cell.strip() for cell in row["cells"].split("|"))
        rows.append((row["name"], row["path"], parameters, flops))
    return rows


def build(path, device="cpu"):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.DEVICE = device
    with torch.device(device):
        return LSNetTrainer.build_model(cfg).eval()


class TestZoo:
    """docs/model_zoo.md"""

    def test_rows_are_the_configs(self):
        configs = ROOT / "configs"
        shipped = {
            str(path.relative_to(configs).with_suffix(""))
            for path in configs.glob("**/*.yaml")
            if path.parent.name not in ("quick", "plus") and not path.name.startswith("Base-")
        }
        # these test the model of another one
        augmented = {name for name in shipped if name.endswith(("_tta", "_flip"))}
        rows = zoo_rows()
        assert sorted(name for name, *_ in rows) == sorted(shipped - augmented)
        assert all(f"](../configs/{name}.yaml)" in ZOO.read_text() for name in augmented)
        assert all(path == f"../configs/{name}.yaml" for name, path, *_ in rows)

    @pytest.mark.parametrize("row", zoo_rows(), ids=lambda row: row[0])
    def test_parameters(self, row):
        name, _, parameters, flops = row
        model = build(ROOT / "configs" / f"{name}.yaml", "meta")
        assert parameters == f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"
        assert float(flops) > 0

    @pytest.mark.slow
    @torch.no_grad()
    def test_multiply_adds(self):
        name, _, _, flops = zoo_rows()[0]
        model = build(ROOT / "configs" / f"{name}.yaml")
        assert flops == f"{count_flops(model, 800, 1216).total() / 1e9:.0f}"


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path, "LSNet")


def test_report(config_file):
    arguments = ["--config-file", config_file, "--size", 64, 96, "--depth", 2, "--structure"]
    result = run_tool("analyze_model.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "(cls_predictor): RefinePredictor(" in result.stdout
    assert re.search(r"\| head.cls_predictor +\| \S+ +\| \S+ +\| \S+ +\|", result.stdout)
    assert "head.cls_predictor.sample" not in result.stdout.partition("#parameters")[2]
    with torch.no_grad():
        model = build(config_file)
        flops = count_flops(model, 64, 96).total()
    parameters = sum(p.numel() for p in model.parameters())
    summary = next(x for x in result.stdout.splitlines() if x.startswith(str(config_file)))
    assert f"{parameters / 1e6:.2f} M parameters" in summary
    assert f"{flops / 1e9:.1f} G multiply-adds" in summary
    assert "Not counted: aten::" in result.stdout


def test_zoo_is_filled_in(tmp_path, monkeypatch, config_file):
    page = tmp_path / "zoo.md"
    row = f"| [tiny]({config_file.name}) | 12.3 | {{}} | {{}} |"
    text = "# Zoo\n\n| config | AP | parameters | FLOPs |\n| --- | --- | --- | --- |\n{}\n\nEnd.\n"
    page.write_text(text.format(row.format("", "7")))
    arguments = ["--zoo", page, "--size", 480, 640]
    assert run_tool_here(monkeypatch, "analyze_model.py", *arguments) == 0
    model = build(config_file)
    with torch.no_grad():
        flops = count_flops(model, 480, 640).total()
    parameters = sum(p.numel() for p in model.parameters())
    measured = f"{parameters / 1e6:.1f}", f"{flops / 1e9:.0f}"
    assert page.read_text() == text.format(row.format(*measured))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zoo", "absent.md"], "no such page: absent.md"),
        (["--zoo", "empty.md"], "empty.md: no row of a table begins with a link to a config"),
        (["--zoo", "stale.md"], "no such config file: gone.yaml"),
        (["--config-file", "x.yaml", "--size", "0", "5"], "--size 0 5: both must be 1 or more"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.md").write_text("# Nothing\n")
    (tmp_path / "stale.md").write_text("| [gone](gone.yaml) | | |\n")
    assert run_tool_here(monkeypatch, "analyze_model.py", *arguments) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "stale.md").read_text() == "| [gone](gone.yaml) | | |\n"
