import pytest
from recipes_project import plan
from tiny_coco import ROOT

from lsnet_d2.errors import ConfigError

PLAN = """
budget: {minutes: 2}
opts: {SOLVER.BASE_LR: 0.1, SOLVER.OPTIMIZER: SGD}
groups:
  boxes:
    ours:
      config: a.yaml
      opts: {SOLVER.BASE_LR: 0.2}
    theirs:
      config: a.yaml
      budget: {like: ours}
      select: segm/AP50
      grid: {SOLVER.BASE_LR: [0.1, 0.2], SOLVER.WEIGHT_DECAY: [0, 1]}
"""


def read(folder, text=PLAN, **kwargs):
    (folder / "a.yaml").touch()
    (folder / "plan.yaml").write_text(text)
    return plan.read_plan(folder / "plan.yaml", **kwargs)


def test_variants_have_what_is_common_and_their_own(tmp_path):
    ours, theirs = read(tmp_path).variants
    assert ours.config == theirs.config == (tmp_path / "a.yaml").resolve()
    assert ours.opts == {"SOLVER.BASE_LR": "0.2", "SOLVER.OPTIMIZER": "SGD"}
    assert (ours.budget.minutes, theirs.budget) == (2, plan.Budget(like="ours"))
    assert (ours.select, theirs.select) == ("bbox/AP", "segm/AP50")
    assert ours.points == [{}]
    rates = [list(point.values()) for point in theirs.points]
    assert rates == [["0.1", "0"], ["0.1", "1"], ["0.2", "0"], ["0.2", "1"]]


def test_names_become_names_of_files():
    assert plan.slug("masks/small") == "masks_small"
    assert plan.slug("../R-CNN (BASE_LR 0.1)") == "r_cnn_base_lr_0_1"
    assert plan.slug("Früchte") == "früchte"


def test_the_command_line_has_the_last_word_on_budgets(tmp_path):
    budget = plan.Budget(iterations=7)
    assert [v.budget for v in read(tmp_path, budget=budget).variants] == [budget, budget]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{like: ours}", "{like: our}", "like 'our'.*did you mean ours"),
        ("{minutes: 2}", "{minutes: 0}", "positive number"),
        ("{minutes: 2}", "{minutes: 2, iterations: 3}", "positive number"),
        ("{minutes: 2}", "{hours: 2}", "unknown key 'hours'"),
        ("config: a.yaml", "config: b.yaml", "boxes: ours: no such config file: .*b.yaml"),
        ("select: segm/AP50", "select: mask/AP", "boxes: theirs: 'select' is 'mask/AP'"),
        ("[0.1, 0.2]", "0.1", "boxes: theirs: 'grid' must have a list"),
        ("groups:", "group:", "unknown key 'group'; did you mean groups"),
        (PLAN, "- 1", "must have some of the keys"),
        (PLAN, "groups: {a: {}}", "group 'a' must have one or more variants"),
        ("groups:", "groups:\n  Boxes: {x: {config: a.yaml}}", "'boxes' would be those of 'Boxes'"),
        ("theirs:", "Ours+:", "files of 'boxes: Ours.' would be those of 'boxes: ours'"),
        ("boxes:", "'/':", "'/' must have letters or digits"),
        (PLAN, "{", "not a plain YAML file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, message):
    assert old in PLAN
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, PLAN.replace(old, new, 1))


@pytest.mark.parametrize("path", sorted((ROOT / "projects").glob("*/*.yaml")), ids=lambda p: p.stem)
def test_the_plans_that_are_shipped(path):
    assert plan.read_plan(path).variants
