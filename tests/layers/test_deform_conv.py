import pytest
import torch
import torchvision
from parity import Recorded, relative_difference

from lsnet_d2.layers import deform_conv
from lsnet_d2.layers.deform_conv import ModulatedDeformConv, sampled_conv, tap_offsets


def nested_loops(feature, offset, mask, weight, bias, stride=1, groups=1):
    """The definition: "same" padding, (y, x) offsets, zero outside."""
    images, channels, height, width = feature.shape
    side = weight.shape[-1]
    out = torch.zeros(images, len(weight), *offset.shape[-2:], dtype=feature.dtype)

    def pixel(image, i, j):
        if 0 <= i < height and 0 <= j < width:
            return feature[image, :, i, j]
        return torch.zeros(channels, dtype=feature.dtype)

    for image in range(images):
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                value = bias.clone()
                for tap in range(side**2):
                    dy, dx = offset[image, 2 * tap : 2 * tap + 2, i, j].tolist()
                    y = stride * i - side // 2 + tap // side + dy
                    x = stride * j - side // 2 + tap % side + dx
                    y0, x0 = int(y // 1), int(x // 1)
                    fy, fx = y - y0, x - x0
                    sample = (1 - fy) * (1 - fx) * pixel(image, y0, x0)
                    sample = sample + (1 - fy) * fx * pixel(image, y0, x0 + 1)
                    sample = sample + fy * (1 - fx) * pixel(image, y0 + 1, x0)
                    sample = sample + fy * fx * pixel(image, y0 + 1, x0 + 1)
                    kernel = torch.block_diag(*weight[..., tap // side, tap % side].chunk(groups))
                    value = value + mask[image, tap, i, j] * (kernel @ sample)
                out[image, :, i, j] = value
    return out


def case(
    images=2, channels=3, out_channels=4, height=5, width=6, side=3, spread=2.0, stride=1, groups=1
):
    generator = torch.Generator().manual_seed(images)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    taps = side**2
    feature = normal(images, channels, height, width)
    height, width = -(-height // stride), -(-width // stride)
    offset = spread * normal(images, 2 * taps, height, width)
    mask = normal(images, taps, height, width).sigmoid()
    weight = normal(out_channels, channels // groups, side, side)
    return feature, offset, mask, weight, normal(out_channels)


# Stride and groups, with channels that these divide; a stride of 2 has sampling before projection.
KINDS = [
    {"channels": 3, "out_channels": 4, "stride": 1, "groups": 1},
    {"channels": 3, "out_channels": 4, "stride": 2, "groups": 1},
    {"channels": 6, "out_channels": 9, "stride": 1, "groups": 3},
    {"channels": 6, "out_channels": 9, "stride": 2, "groups": 3},
]


@pytest.fixture(params=KINDS, ids=lambda kind: f"stride{kind['stride']}-groups{kind['groups']}")
def kind(request):
    return request.param


def test_torch_implementation_against_nested_loops(kind):
    inputs = *case(**kind), kind["stride"], kind["groups"]
    expected = nested_loops(*inputs)
    torch.testing.assert_close(deform_conv._torch_modulated_deform_conv(*inputs), expected)


@pytest.mark.parametrize("images", [0, 1, 33])
def test_torch_implementation_against_torchvision(images, kind):
    inputs = *case(images=images, spread=20.0, **kind), kind["stride"], kind["groups"]
    ours = deform_conv._torch_modulated_deform_conv(*inputs)
    theirs = deform_conv._torchvision_modulated_deform_conv(*inputs)
    torch.testing.assert_close(ours, theirs)


def test_gradients_against_torchvision(kind):
    gradients = []
    for function in (
        deform_conv._torch_modulated_deform_conv,
        deform_conv._torchvision_modulated_deform_conv,
    ):
        inputs = [t.requires_grad_() for t in case(spread=3.0, **kind)]
        out = function(*inputs, kind["stride"], kind["groups"])
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients.append(torch.autograd.grad((out * weights).sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_gradcheck(stride, groups):
    inputs = [
        t.requires_grad_() for t in case(1, 2, 2, 3, 4, spread=0.7, stride=stride, groups=groups)
    ]
    assert torch.autograd.gradcheck(
        lambda *x: deform_conv._torch_modulated_deform_conv(*x, stride, groups), inputs
    )


def test_far_and_infinite_places_sample_zero():
    feature = torch.ones(1, 1, 4, 4)
    weight = torch.ones(1, 1, 1, 1)
    for place in (-1.0, -5.0, 4.0, 1e30, -torch.inf, torch.inf):
        y = torch.full((1, 1, 1, 1), place)
        assert sampled_conv(feature, weight, y, torch.zeros_like(y)).item() == 0
    just_inside = torch.full((1, 1, 1, 1), -0.25)
    assert sampled_conv(feature, weight, just_inside, torch.zeros_like(just_inside)).item() == 0.75


def test_module_without_offsets_is_a_convolution_of_half_strength():
    torch.manual_seed(0)
    module = ModulatedDeformConv(4, 5)
    feature = torch.randn(2, 4, 6, 7)
    expected = torch.nn.functional.conv2d(feature, module.weight, padding=1) / 2
    torch.testing.assert_close(module(feature), expected)


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_module_is_a_convolution_with_stride_groups_and_norm(stride, groups):
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(12).eval()
    norm.running_mean.normal_()
    module = ModulatedDeformConv(8, 12, stride=stride, groups=groups, bias=False, norm=norm)
    assert {name for name, _ in module.named_parameters()} == {
        "weight", "conv_offset.weight", "conv_offset.bias", "norm.weight", "norm.bias"
    }  # fmt: skip
    feature = torch.randn(2, 8, 7, 5)
    expected = torch.nn.functional.conv2d(
        feature, module.weight, padding=1, stride=stride, groups=groups
    )
    torch.testing.assert_close(module(feature), norm(expected / 2))


def test_autocast_keeps_places():
    """bfloat16 has no odd numbers above 256, so the places must not be computed in it."""
    torch.manual_seed(0)
    for stride in (1, 2):
        module = ModulatedDeformConv(2, 2, stride=stride, bias=False)
        feature = torch.arange(600.0).mul(0.01).sin().expand(1, 2, 3, -1)
        expected = module(feature)
        with torch.autocast("cpu", torch.bfloat16):
            out = module(feature)
        assert out.dtype == torch.bfloat16
        assert relative_difference(out, expected) < 0.02


@pytest.mark.parametrize("number", range(10))
def test_value_and_gradients_are_those_of_the_released_code(parity, number):
    """One level of a pyramid convolution: taps at (cell + tap) * scale + offset."""
    recorded = Recorded("comp_pyramid_dcn.npz", f"c{number}.")
    names = ("input", "offset", "weight")
    feature, offset, weight = inputs = [recorded[name].requires_grad_() for name in names]
    height, width = offset.shape[-2:]
    scale_h, scale_w = recorded["scale_hw"].float()
    tap_x, tap_y = tap_offsets(3).float().unbind(1)
    y = (torch.arange(height)[:, None] + tap_y.view(-1, 1, 1)) * scale_h + offset[:, 0::2]
    x = (torch.arange(width) + tap_x.view(-1, 1, 1)) * scale_w + offset[:, 1::2]
    out = sampled_conv(feature, weight, y, x)
    parity.to_largest("pyramid sampling", out, recorded["output"], within=1e-5)
    gradients = torch.autograd.grad(out, inputs, recorded["grad_output"])
    for name, gradient in zip(names, gradients, strict=True):
        expected = recorded[f"grad_{name}"]
        parity.to_largest(f"pyramid sampling, gradient of {name}", gradient, expected, within=1e-5)


class TestSelection:
    """Which implementation runs where; CUDA itself is not needed."""

    @pytest.mark.parametrize("device", ["cpu", "mps"])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_without_cuda(self, device, autocast):
        chosen = deform_conv.select_implementation(device, autocast)
        assert chosen is deform_conv._torch_modulated_deform_conv

    @pytest.mark.parametrize(
        ("compiled", "autocast", "expected"),
        [
            (True, False, "_detectron2_modulated_deform_conv"),
            (True, True, "_torchvision_modulated_deform_conv"),
            (False, False, "_torchvision_modulated_deform_conv"),
            (False, True, "_torchvision_modulated_deform_conv"),
        ],
    )
    def test_on_cuda(self, monkeypatch, compiled, autocast, expected):
        monkeypatch.setattr(deform_conv, "_detectron2_has_cuda_operators", lambda: compiled)
        chosen = deform_conv.select_implementation("cuda", autocast)
        assert chosen is getattr(deform_conv, expected)

    def test_detectron2_receives_the_same_convolution(self, monkeypatch, kind):
        """Its operator has the positional signature that torchvision's keywords spell out."""
        from detectron2.layers import deform_conv as theirs

        def fake(feature, offset, mask, weight, bias, stride, padding, dilation, groups, d_groups):
            assert d_groups == 1
            assert groups * weight.shape[1] == feature.shape[1]
            assert feature.is_contiguous() and offset.is_contiguous() and mask.is_contiguous()
            return torchvision.ops.deform_conv2d(
                feature, offset, weight, bias, stride, padding, dilation, mask
            )

        monkeypatch.setattr(theirs, "modulated_deform_conv", fake)
        images = [x.to(memory_format=torch.channels_last) for x in case(**kind)[:3]]
        inputs = *images, *case(**kind)[3:], kind["stride"], kind["groups"]
        torch.testing.assert_close(
            deform_conv._detectron2_modulated_deform_conv(*inputs),
            deform_conv._torch_modulated_deform_conv(*inputs),
        )
