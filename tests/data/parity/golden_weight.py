"""The weight rule of the golden data (needs numpy only).

golden_weight(name, shape) -> float32 array (int64 0 for num_batches_tracked).
`name` is the key of the reference's state_dict (see <case>.names.json).
"""

import zlib

import numpy as np

# regression outputs whose bias gets a fixed geometric pattern: name suffix -> amplitude
_PATTERN_AMP = {"_init_out.bias": 2.0, "_refine_out.bias": 2.0}


def _pattern(v, amp):
    """bias of the v landmark vectors, channel order [up, down, left, right] per vector,
    plus 4 zeros for the centre vector."""
    out = np.zeros(4 * (v + 1))
    for k in range(v):
        a = 2.0 * np.pi * k / v
        dy = -np.cos(a)
        dx = -np.sin(a) if v == 4 else np.sin(a)  # v==4: top,left,bottom,right
        out[4 * k : 4 * k + 4] = amp * np.array(
            [max(0.0, -dy), max(0.0, dy), max(0.0, -dx), max(0.0, dx)]
        )
    return out


def golden_weight(name, shape):
    shape = tuple(int(s) for s in shape)
    leaf = name.split(".")[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    g = rng.standard_normal(shape)  # the only draw, float64, C order
    if leaf == "running_mean":
        w = 0.02 * g
    elif leaf == "running_var":
        w = 1.0 + 0.1 * np.abs(g)
    elif len(shape) >= 2:  # conv weight
        fan_in = int(np.prod(shape[1:]))
        w = g * np.sqrt(2.0 / fan_in) * 0.7
        if "conv_offset" in name:
            w = w * 0.05
        elif name.endswith("pts_cls_out.weight"):
            w = w * 2.0
        elif name.endswith(("_init_out.weight", "_refine_out.weight")):
            w = w - w.mean(
                axis=1, keepdims=True
            )  # zero-sum rows: no constant bias from ReLU'd input
        elif name.endswith(("hem_tl_offset_out.weight", "hem_br_offset_out.weight")):
            w = w * 0.5
    elif leaf == "weight":  # BN / GN scale
        w = 1.0 + 0.05 * g
    elif leaf == "bias":
        if name.endswith("pts_cls_out.bias"):
            w = (-3.0 if shape[0] == 1 else -5.5) + 0.05 * g
        elif name.endswith(("hem_tl_score_out.bias", "hem_br_score_out.bias", "sem_out.bias")):
            w = -2.0 + 0.05 * g
        else:
            w = 0.02 * g
            for suffix, amp in _PATTERN_AMP.items():
                if name.endswith(suffix):
                    v = 4 if shape[0] == 28 else shape[0] // 4 - 1
                    w[: 4 * (v + 1)] += _pattern(v, amp)
    else:
        raise KeyError(name)
    return np.asarray(w, np.float32)
