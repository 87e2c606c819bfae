"""Which landmark branches a config asks for: the one place that knows the names of the tasks."""

from detectron2.config import CfgNode

# Task -> its branches in order, each with the weights of its losses in the init and the refine
# stage (released code, configs).
TASKS: dict[str, dict[str, tuple[float, float]]] = {
    "bbox": {"extreme": (1.0, 2.0)},
    "segm": {"contour": (1.0, 2.0)},
    "pose_bbox": {"extreme": (0.1, 0.2), "keypoint": (1.0, 2.0)},
    "pose_kbox": {"keypoint": (1.0, 2.0)},
}
JOINT = "joint"
BRANCH_NAMES = ("extreme", "contour", "keypoint")
_JOINT_WEIGHTS = (1.0, 2.0)


def branch_weights(cfg: CfgNode) -> dict[str, tuple[float, float]]:
    """The branches of ``MODEL.LSNET.TASK`` in order, with their loss weights (init, refine).

    Raises:
        ValueError: the task or a branch is unknown, or there are not as many weights as branches;
            the message names the key.
    """
    node = cfg.MODEL.LSNET
    if node.TASK == JOINT:
        branches = dict.fromkeys(node.BRANCHES, _JOINT_WEIGHTS)
        if not branches or len(branches) < len(node.BRANCHES) or set(branches) - set(BRANCH_NAMES):
            raise ValueError(
                f"MODEL.LSNET.BRANCHES is {list(node.BRANCHES)}; it must list one or more of "
                f"{', '.join(BRANCH_NAMES)}, each once"
            )
    elif node.TASK in TASKS:
        branches = TASKS[node.TASK]
    else:
        known = ", ".join([*TASKS, JOINT])
        raise ValueError(f"MODEL.LSNET.TASK is {node.TASK!r}; it must be one of {known}")
    defaults = zip(*branches.values(), strict=True)
    stages = []
    for key, default in zip(("INIT", "REFINE"), defaults, strict=True):
        weights = list(node[f"{key}_LOSS_WEIGHTS"]) or default
        if len(weights) != len(branches):
            raise ValueError(
                f"MODEL.LSNET.{key}_LOSS_WEIGHTS is {weights}; it must have one value for each of "
                f"the branches {', '.join(branches)}, or none for the task's own"
            )
        stages.append(weights)
    return dict(zip(branches, zip(*stages, strict=True), strict=True))
