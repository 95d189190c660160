"""A VirTex small enough for tests, and the same network written with torch's own layers."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.simvlm_tiny import randomize
from vlmkernels.models.virtex import VirTex, VirTexConfig

BLOCKS, WIDTH, VOCABULARY = (2, 1, 1, 1), 4, 23


def tiny_config(task: str = "bicaptioning", **fields) -> VirTexConfig:
    """Four stages without the stem's pooling: 4 image tokens of 128 channels; 2 layers of width 24."""
    sizes = {
        "image_size": 32,
        "conv_blocks": BLOCKS,
        "conv_width": WIDTH,
        "conv_pool": False,
        "width": 24,
        "layers": 2,
        "heads": 3,
        "dropout": 0.0,
        "context_length": 9,
        "vocab_size": VOCABULARY,
    }
    return VirTexConfig(task=task, **{**sizes, **fields})


def tiny_model(task: str = "bicaptioning", **fields) -> VirTex:
    """In float64, every parameter and statistic away from its initial value."""
    model = VirTex(tiny_config(task, **fields))
    randomize(model)
    return model.double()


def tiny_batch() -> tuple[Tensor, Tensor]:
    """Images, and captions of different lengths: one cut off, one with an unknown word, which is padding."""
    rows = [
        [1, 5, 6, 7, 8, 9, 10, 11, 2],
        [1, 12, 13, 14, 2, 0, 0, 0, 0],
        [1, 7, 7, 20, 9, 4, 21, 22, 15],
        [1, 16, 0, 17, 16, 2, 0, 0, 0],
    ]
    return torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor(rows)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, widen: int) -> None:
        super().__init__()
        inner = widen * width
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride > 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class TorchResNet(nn.Module):
    """ResNet-50 with `blocks` of (3, 4, 6, 3) and `width` 64, without its head."""

    def __init__(self, blocks, width: int, pool: bool, widen: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        channels = width
        for i, count in enumerate(blocks):
            inner, stage = width * 2**i, []
            for j in range(count):
                stage.append(Bottleneck(channels, inner, 2 if i and not j else 1, widen))
                channels = 4 * inner
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.count = len(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(self.count):
            x = getattr(self, f"layer{i + 1}")(x)
        return x


class TorchTextual(nn.Module):
    """Projection, embedding, nn.TransformerDecoder and tied output, under the names of kdexd/virtex."""

    def __init__(self, config: VirTexConfig, channels: int) -> None:
        super().__init__()
        width = config.width
        self.visual_projection = nn.Linear(channels, width)
        self.embedding = nn.Module()
        self.embedding.words = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_id)
        self.embedding.positions = nn.Embedding(config.context_length, width)
        self.embedding.layer_norm = nn.LayerNorm(width, eps=1e-8)
        layer = nn.TransformerDecoderLayer(
            width,
            config.heads,
            4 * width,
            config.dropout,
            "gelu",
            batch_first=True,
            norm_first=config.pre_norm,
        )
        last = nn.LayerNorm(width) if config.pre_norm else None
        self.transformer = nn.TransformerDecoder(layer, config.layers, last)
        self.output = nn.Linear(width, config.vocab_size)
        self.output.weight = self.embedding.words.weight
        self.causal = config.task != "masked_lm"

    def forward(self, grid: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        memory = self.visual_projection(grid.flatten(2).transpose(1, 2))
        place = torch.arange(tokens.shape[1])
        x = self.embedding.words(tokens) + self.embedding.positions(place)
        x = self.embedding.layer_norm(x) * (tokens != self.embedding.words.padding_idx)[..., None]
        future = torch.ones(len(place), len(place)).triu(1).bool() if self.causal else None
        out = self.transformer(x, memory, tgt_mask=future, tgt_key_padding_mask=place >= lengths[:, None])
        return self.output(out)


class TorchVirTex(nn.Module):
    """The published model: its state dict has the published names."""

    def __init__(self, config: VirTexConfig) -> None:
        super().__init__()
        self.task = config.task
        self.visual = nn.Module()
        self.visual.cnn = TorchResNet(
            config.conv_blocks, config.conv_width, config.conv_pool, config.conv_widen
        )
        channels = config.conv_width * 2 ** (len(config.conv_blocks) + 1)
        if config.task == "token_classification":
            self.textual = nn.Module()
            self.textual.output = nn.Linear(channels, config.vocab_size)
            return
        self.textual = TorchTextual(config, channels)
        if config.task == "bicaptioning":
            self.backward_textual = copy.deepcopy(self.textual)
            for shared in ("visual_projection", "embedding", "output"):
                setattr(self.backward_textual, shared, getattr(self.textual, shared))

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor, labels: Tensor | None = None):
        """The loss and the logits of each direction, as the original computes them."""
        grid = self.visual.cnn(images)
        if self.task == "token_classification":
            logits = self.textual.output(grid.mean((2, 3)))
            losses = []
            for row, log_probabilities in zip(tokens.tolist(), logits.log_softmax(1), strict=True):
                losses.append(-log_probabilities[sorted(set(row) - {0, 1, 2})].mean())
            return sum(losses) / len(losses), [logits]
        if labels is not None:
            logits = self.textual(grid, tokens, lengths)
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), [logits]
        passes = [(self.textual, tokens)]
        if self.task == "bicaptioning":
            reversed_ = [
                row[:length].flip(0).tolist() + row[length:].tolist()
                for row, length in zip(tokens, lengths.tolist(), strict=True)
            ]
            passes.append((self.backward_textual, torch.tensor(reversed_)))
        every = [head(grid, ids, lengths) for head, ids in passes]
        loss = sum(
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
            for logits, (_, ids) in zip(every, passes, strict=True)
        )
        return loss, every
