"""EfficientNet without its classification head: image [B, 3, H, W] -> global mean of the last stage [B, C].

Tan & Le 2019 (arXiv:1905.11946): one table of seven stages of MBConv blocks (B0), widened and deepened by the
compound rule, channels = round8(width * c) and repeats = ceil(depth * n). The 1x1 head convolution is
omitted, as in ALIGN (Jia et al. 2021, section 4), unless it is asked for: the feature is the pooled output of
the last stage, 320 * width channels.

A block maps x to project(SE(depthwise(expand(x)))) with batch norm after every convolution and SiLU after the
first two. Blocks after the first of a stage add x, and in training drop their branch for whole samples
(stochastic depth, with a probability that rises linearly with the block's index). Lite variants have no SE,
ReLU6 in place of SiLU, and neither the stem nor the repeats of the first and last stage are scaled. Parameter
names are those of Hugging Face's ALIGN vision model.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models.parts.stochastic_depth import drop_branch

# name: (width, depth, resolution), the published compound coefficients
COEFFICIENTS: dict[str, tuple[float, float, int]] = {
    "b0": (1.0, 1.0, 224),
    "b1": (1.0, 1.1, 240),
    "b2": (1.1, 1.2, 260),
    "b3": (1.2, 1.4, 300),
    "b4": (1.4, 1.8, 380),
    "b5": (1.6, 2.2, 456),
    "b6": (1.8, 2.6, 528),
    "b7": (2.0, 3.1, 600),
    "l2": (4.3, 5.3, 800),
}
LITE: dict[str, tuple[float, float, int]] = {
    "lite0": (1.0, 1.0, 224),
    "lite1": (1.0, 1.1, 240),
    "lite2": (1.1, 1.2, 260),
    "lite3": (1.2, 1.4, 280),
    "lite4": (1.4, 1.8, 300),
}

STEM_CHANNELS, HEAD_CHANNELS = 32, 1280
KERNELS = (3, 3, 5, 3, 5, 5, 3)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)
REPEATS = (1, 2, 2, 3, 3, 4, 1)
CHANNELS = (16, 24, 40, 80, 112, 192, 320)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
PADDINGS = ("same", "fixed")


def round_channels(channels: int, width: float, divisor: int = 8) -> int:
    """width * channels rounded to a multiple of `divisor`, never more than 10 % below."""
    wanted = width * channels
    rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * wanted else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Blocks of a stage: depth * repeats, rounded up."""
    return math.ceil(depth * repeats)


class StridedPad(nn.Module):
    """Zero padding before a convolution of stride 2.

    "same" is TensorFlow's rule, ceil(H / 2) outputs: k - 2 zeros for an even side and k - 1 for an odd one,
    the odd zero on the right and at the bottom. "fixed" always pads as for an even side, floor(H / 2)
    outputs: what Hugging Face's ALIGN and the weights published with it do at every size.
    """

    def __init__(self, kernel: int, mode: str):
        super().__init__()
        self.kernel, self.mode = kernel, mode

    def amounts(self, size: int) -> tuple[int, int]:
        total = self.kernel - 2 + (size % 2 if self.mode == "same" else 0)
        return total // 2, total - total // 2

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return F.pad(x, (*self.amounts(x.shape[3]), *self.amounts(x.shape[2])))


def _activation(lite: bool) -> Callable[[Tensor], Tensor]:
    return F.relu6 if lite else F.silu


class MBConv(nn.Module):
    """Inverted bottleneck; squeeze-and-excitation, unless lite, to a quarter of the *input* channels."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        expansion: int,
        kernel: int,
        stride: int,
        first: bool,
        drop_rate: float,
        padding: str,
        eps: float,
        momentum: float,
        lite: bool,
    ):
        super().__init__()
        self.activation = _activation(lite)
        wide, squeezed = c_in * expansion, max(1, c_in // 4)
        self.residual = stride == 1 and not first
        self.drop_rate = drop_rate
        self.expansion: nn.ModuleDict | None = None
        if expansion != 1:
            self.expansion = nn.ModuleDict(
                {
                    "expand_conv": nn.Conv2d(c_in, wide, 1, bias=False),
                    "expand_bn": nn.BatchNorm2d(wide, eps=eps, momentum=momentum),
                }
            )
        self.pad = StridedPad(kernel, padding) if stride == 2 else nn.Identity()
        inner = 0 if stride == 2 else kernel // 2
        self.depthwise_conv = nn.ModuleDict(
            {
                "depthwise_conv": nn.Conv2d(wide, wide, kernel, stride, inner, groups=wide, bias=False),
                "depthwise_norm": nn.BatchNorm2d(wide, eps=eps, momentum=momentum),
            }
        )
        self.squeeze_excite: nn.ModuleDict | None = None
        if not lite:
            self.squeeze_excite = nn.ModuleDict(
                {"reduce": nn.Conv2d(wide, squeezed, 1), "expand": nn.Conv2d(squeezed, wide, 1)}
            )
        self.projection = nn.ModuleDict(
            {
                "project_conv": nn.Conv2d(wide, c_out, 1, bias=False),
                "project_bn": nn.BatchNorm2d(c_out, eps=eps, momentum=momentum),
            }
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, c_in, H, W] -> [B, c_out, H', W']
        h = x
        if self.expansion is not None:
            h = self.activation(self.expansion["expand_bn"](self.expansion["expand_conv"](h)))
        h = self.depthwise_conv["depthwise_conv"](self.pad(h))
        h = self.activation(self.depthwise_conv["depthwise_norm"](h))
        if self.squeeze_excite is not None:
            gate = self.activation(self.squeeze_excite["reduce"](h.mean((2, 3), keepdim=True)))
            h = h * self.squeeze_excite["expand"](gate).sigmoid()
        h = self.projection["project_bn"](self.projection["project_conv"](h))
        return x + drop_branch(h, self.drop_rate, self.training) if self.residual else h


class EfficientNet(nn.Module):
    """Stem, MBConv stages, a head if any, and global mean; `feature_dim` is the number of channels returned.

    width, depth: compound coefficients (`COEFFICIENTS`). strides: of the seven stages; the stem adds 2.
    drop_rate: stochastic depth of the block after the last (block i of n uses drop_rate * i / n).
    momentum is torch's weight of the *new* batch statistic: TensorFlow's 0.99 is 0.01 here. lite: as
    EfficientNet-Lite (`LITE`). head: channels of a 1x1 convolution after the last stage.
    """

    def __init__(
        self,
        width: float,
        depth: float,
        *,
        strides: Sequence[int] = STRIDES,
        drop_rate: float = 0.2,
        padding: str = "same",
        eps: float = 1e-3,
        momentum: float = 0.01,
        lite: bool = False,
        head: int | None = None,
    ):
        super().__init__()
        self.activation = _activation(lite)
        stem = STEM_CHANNELS if lite else round_channels(STEM_CHANNELS, width)
        self.padding = padding
        self.total_stride = 2 * math.prod(strides)
        self.pad = StridedPad(3, padding)
        self.embeddings = nn.ModuleDict(
            {
                "convolution": nn.Conv2d(3, stem, 3, 2, bias=False),
                "batchnorm": nn.BatchNorm2d(stem, eps=eps, momentum=momentum),
            }
        )
        blocks: list[nn.Module] = []
        counts = [round_repeats(n, depth) for n in REPEATS]
        if lite:
            counts[0], counts[-1] = REPEATS[0], REPEATS[-1]
        n_blocks = sum(counts)
        c_in = stem
        for kernel, expansion, repeats, channels, stride in zip(
            KERNELS, EXPANSIONS, counts, CHANNELS, strides, strict=True
        ):
            c_out = round_channels(channels, width)
            for j in range(repeats):
                block = MBConv(
                    c_in,
                    c_out,
                    expansion=expansion,
                    kernel=kernel,
                    stride=stride if j == 0 else 1,
                    first=j == 0,
                    drop_rate=drop_rate * len(blocks) / n_blocks,
                    padding=padding,
                    eps=eps,
                    momentum=momentum,
                    lite=lite,
                )
                blocks.append(block)
                c_in = c_out
        self.encoder = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
        self.head: nn.ModuleDict | None = None
        if head is not None:
            self.head = nn.ModuleDict(
                {
                    "convolution": nn.Conv2d(c_in, head, 1, bias=False),
                    "batchnorm": nn.BatchNorm2d(head, eps=eps, momentum=momentum),
                }
            )
        self.feature_dim = c_in if head is None else head
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        """N(0, 2 / fan_out) for convolutions (fan_out per group), as in the official TensorFlow code."""
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, C, H/32, W/32]
        """The map before pooling, of the last stage or of the head."""
        if self.padding == "fixed" and min(images.shape[2:]) < self.total_stride:
            raise ValueError(
                f"images must have sides of at least {self.total_stride} pixels with padding 'fixed', "
                f"got {images.shape[2]} x {images.shape[3]}"
            )
        x = self.activation(self.embeddings["batchnorm"](self.embeddings["convolution"](self.pad(images))))
        x = self.encoder["blocks"](x)
        return (
            x if self.head is None else self.activation(self.head["batchnorm"](self.head["convolution"](x)))
        )

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, C]
        return self.features(images).mean((2, 3))


# The names of EfficientNet-PyTorch (and of its Lite fork) and those here.
_THEIR_NAMES = {
    r"_conv_stem\.": "embeddings.convolution.",
    r"_bn0\.": "embeddings.batchnorm.",
    r"_conv_head\.": "head.convolution.",
    r"_bn1\.": "head.batchnorm.",
    r"_blocks\.(\d+)\._expand_conv\.": r"encoder.blocks.\1.expansion.expand_conv.",
    r"_blocks\.(\d+)\._bn0\.": r"encoder.blocks.\1.expansion.expand_bn.",
    r"_blocks\.(\d+)\._depthwise_conv\.": r"encoder.blocks.\1.depthwise_conv.depthwise_conv.",
    r"_blocks\.(\d+)\._bn1\.": r"encoder.blocks.\1.depthwise_conv.depthwise_norm.",
    r"_blocks\.(\d+)\._se_(reduce|expand)\.": r"encoder.blocks.\1.squeeze_excite.\2.",
    r"_blocks\.(\d+)\._project_conv\.": r"encoder.blocks.\1.projection.project_conv.",
    r"_blocks\.(\d+)\._bn2\.": r"encoder.blocks.\1.projection.project_bn.",
}


def from_efficientnet_pytorch(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an EfficientNet of EfficientNet-PyTorch or its Lite fork under the names here.

    Its classifier, `_fc`, is left out. ValueError lists names that are not of such a model.
    """
    renamed, unknown = {}, []
    for name, tensor in state_dict.items():
        if name.startswith("_fc."):
            continue
        for theirs, ours in _THEIR_NAMES.items():
            new, count = re.subn(f"^{theirs}", ours, name)
            if count:
                renamed[new] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"state_dict must be of EfficientNet-PyTorch, but has {', '.join(unknown)}")
    return renamed
