"""Every model and module of layers, tiny, in float64, away from its initial weights, with a batch for it."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import detector_tiny, flamingo_tiny, simvlm_tiny, virtex_tiny
from tests.parity import randomize
from vlmkernels.models.align import ALIGN, AlignConfig
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.models.decoder import CausalLM
from vlmkernels.models.vild import Classes, ViLD, ViLDConfig
from vlmkernels.models.visualbert import VisualBERT, VisualBertConfig
from vlmkernels.models.visualgpt import VisualGPT, VisualGPTConfig
from vlmkernels.nn import GatedCrossAttentionBlock, PerceiverResampler
from vlmkernels.nn.families import BLOCK_PRESETS, RESAMPLER_PRESETS

EOT = 96
TEXT = {"vocab_size": EOT + 1, "context_length": 12, "text_width": 24, "text_layers": 2, "text_heads": 3}
VIT = ClipConfig(
    embed_dim=16, image_size=16, patch_size=8, vision_width=24, vision_layers=2, vision_heads=3, eot_id=EOT,
    **TEXT,
)  # fmt: skip
RESNET = ClipConfig(
    embed_dim=16, image_size=32, patch_size=None, vision_width=4, vision_layers=(1, 1, 1, 1), vision_heads=2,
    eot_id=EOT, quick_gelu=True, **TEXT,
)  # fmt: skip
ALIGN_TINY = AlignConfig(
    embed_dim=24, image_size=32, image_width=0.25, image_depth=0.3, image_projection=True, drop_rate=0.0,
    vocab_size=97, max_positions=16, context_length=12, text_width=24, text_heads=3, text_layers=2,
    text_mlp_width=40, text_dropout=0.0, text_pooler=False,
)  # fmt: skip

VISUALBERT_TINY = VisualBertConfig(
    visual_dim=16, vocab_size=97, context_length=12, max_positions=16, width=24, layers=2, heads=3,
    mlp_width=40, dropout=0.0,
)  # fmt: skip

VISUALGPT_TINY = VisualGPTConfig(
    image_size=16, conv_blocks=(1, 1), conv_width=4, conv_pool=False, width=24, encoder_layers=2,
    encoder_mlp_width=32, layers=1, heads=3, context_length=12, vocab_size=97, start_id=1, end_id=EOT,
    pad_id=0, dropout=0.0, cross_dropout=0.0,
)  # fmt: skip

VILD_TINY = ViLDConfig(detector=detector_tiny.TINY, variant="ensemble", embed_dim=6)


@dataclass
class Case:
    model: nn.Module
    batch: Callable[..., tuple]  # (rows=3, length=10) -> the arguments of the model
    tensor: Callable[[object], Tensor] = lambda out: out  # one tensor that depends on every output

    def run(self, *arguments) -> Tensor:
        return self.tensor(self.model(*(arguments or self.batch())))


def texts(rows: int, length: int, end: int) -> Tensor:
    """Texts of different lengths that end with `end`, padded with 0; the first one is the longest."""
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(1, end, (rows, length), generator=generator)
    last = (length - 1 - torch.arange(rows) * 3 % (length - 2))[:, None]
    place = torch.arange(length)
    return tokens.masked_fill(place == last, end).masked_fill(place > last, 0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def features(out) -> Tensor:
    return torch.cat([out["image_features"], out["text_features"]], 1) * out["logit_scale"]


def clip(config: ClipConfig) -> Case:
    side = config.image_size
    model = randomize(CLIP(config))
    return Case(
        model, lambda rows=3, length=10: (numbers(rows, 3, side, side), texts(rows, length, EOT)), features
    )


def align() -> Case:
    def batch(rows=3, length=10):
        return numbers(rows, 3, 32, 32), texts(rows, length, EOT)

    return Case(randomize(ALIGN(ALIGN_TINY)), batch, features)


def simvlm(form: str) -> Case:
    def batch(rows=3, length=10):
        tokens = texts(rows, length, 2 + 20) % 29 + 1
        return numbers(rows, 3, 24, 24), tokens, torch.ones(rows, dtype=torch.int64)

    return Case(simvlm_tiny.tiny_model(form), batch, lambda out: out["loss"])


def virtex() -> Case:
    def batch(rows=3, length=10):
        tokens = texts(rows, length, virtex_tiny.VOCABULARY - 1)
        return numbers(rows, 3, 32, 32), tokens

    ends = {"eos_id": virtex_tiny.VOCABULARY - 1, "context_length": 12}
    return Case(virtex_tiny.tiny_model(**ends), batch, lambda out: out["loss"])


def visualbert() -> Case:
    def batch(rows=3, length=10):
        tokens = texts(rows, length, EOT)
        labels = tokens.masked_fill(torch.arange(length) % 3 != 1, -100)
        return tokens, numbers(rows, 4, 16), labels

    return Case(
        randomize(VisualBERT(VISUALBERT_TINY)), batch, lambda out: out["match_logits"].sum() + out["loss"]
    )


def visualgpt() -> Case:
    def batch(rows=3, length=10):
        return numbers(rows, 3, 16, 16), texts(rows, length, EOT)

    return Case(randomize(VisualGPT(VISUALGPT_TINY)), batch, lambda out: out["loss"])


class Detecting(nn.Module):
    """A ViLD with what its images show and what is drawn of it."""

    def __init__(self) -> None:
        super().__init__()
        self.vild = randomize(ViLD(VILD_TINY))
        self.classes, self.taught = Classes(numbers(4, 6)), numbers(2, 6)

    def forward(self, images: Tensor) -> Tensor:
        boxes = images.new_tensor([[4, 6, 30, 40], [20, 30, 60, 60]])
        target = {
            "boxes": boxes,
            "labels": torch.tensor([1, 3], device=images.device),
            "masks": images.new_ones(2, 64, 64, dtype=torch.bool),
            "proposals": boxes + 3,
            "embeddings": self.taught,
        }
        generators = [torch.Generator().manual_seed(row) for row in range(len(images))]
        return self.vild(images, [target] * len(images), self.classes, generators=generators)["loss"]


def vild() -> Case:
    return Case(Detecting(), lambda rows=3, length=10: (numbers(rows, 3, 64, 64).sigmoid(),))


def flamingo() -> Case:
    def batch(rows=3, length=14):
        vision_x, lang_x = flamingo_tiny.inputs(rows=rows, length=length)
        return vision_x.double(), lang_x, None, lang_x

    return Case(flamingo_tiny.flamingo().double(), batch, lambda out: out["logits"] + out["loss"])


def decoder() -> Case:
    def batch(rows=3, length=10):
        return (texts(rows, length, 39),)

    return Case(randomize(CausalLM(flamingo_tiny.OURS)), batch, lambda out: out.logits)


def resampler(family: str, **options) -> Case:
    sizes = {"depth": 2, "dim_head": 8, "heads": 4, "num_latents": 5}
    model = randomize(PerceiverResampler(24, **sizes, **RESAMPLER_PRESETS[family], **options))
    return Case(model, lambda rows=3, length=10: (numbers(rows, 4, 1, length, 24),))


def block(family: str) -> Case:
    model = randomize(
        GatedCrossAttentionBlock(24, 16, dim_head=8, heads=4, kv_heads=2, **BLOCK_PRESETS[family])
    )

    def batch(rows=3, length=10):
        places = torch.zeros(rows, length, dtype=torch.bool)
        places[:, 2] = places[1:, 4] = True
        return numbers(rows, length, 24), numbers(rows, 2, 3, 16), places

    return Case(model, batch)


CASES: dict[str, Callable[[], Case]] = {
    "clip": lambda: clip(VIT),
    "clip-resnet": lambda: clip(RESNET),
    "align": align,
    "simvlm": lambda: simvlm("encoder_decoder"),
    "simvlm-prefix_lm": lambda: simvlm("prefix_lm"),
    "virtex": virtex,
    "visualbert": visualbert,
    "visualgpt": visualgpt,
    "vild": vild,
    "flamingo": flamingo,
    "decoder": decoder,
    "resampler": lambda: resampler("open_flamingo"),
    "resampler-rms": lambda: resampler("idefics2", qk_norm=True),
    "resampler-squared_relu": lambda: resampler("flamingo", max_num_media=4, max_num_frames=2),
    "block": lambda: block("open_flamingo"),
    "block-swiglu": lambda: block("mllama_meta"),
    "block-all": lambda: block("mllama"),
}


def build(name: str) -> Case:
    torch.manual_seed(0)
    case = CASES[name]()
    case.model.eval()
    return case


@contextlib.contextmanager
def one_process():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
