"""Tiny language models in every layout that Flamingo takes, and inputs for them."""

import torch

from benchmarks import peers
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.models.decoder import CausalLM, DecoderConfig
from vlmkernels.models.flamingo import Flamingo, FlamingoConfig

VOCABULARY, MEDIA, END, PAD = 40, 38, 39, 0
WIDTH = 32
VISION = ClipConfig(
    embed_dim=16, image_size=16, patch_size=8, vision_layers=2, vision_width=24, vision_heads=3,
    context_length=8, vocab_size=50, text_width=16, text_layers=1, text_heads=2, eot_id=49,
)  # fmt: skip
OURS = DecoderConfig(vocab_size=VOCABULARY, width=WIDTH, layers=4, heads=2, context_length=64)
SMALL = {"num_latents": 3, "resampler_depth": 2, "resampler_heads": 2, "resampler_dim_head": 8}
SMALL |= {"heads": 2, "dim_head": 8}
LAYOUTS = ("gpt2", "gptj", "opt", "llama", "gpt_neox", "mpt")


def language_model(kind):
    """A transformers decoder of four layers, or ours, with weights far from the small initial ones."""
    torch.manual_seed(11)
    if kind == "ours":
        return sharpen(CausalLM(OURS), 20.0)
    transformers = peers.load("transformers")
    if kind in ("gpt2", "gptj"):
        sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "n_layer": 4, "n_head": 2}
        ids = {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        if kind == "gpt2":
            return sharpen(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids)))
        return sharpen(transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes, **ids, rotary_dim=8)))
    if kind == "mpt":
        sizes = {"d_model": WIDTH, "n_heads": 2, "n_layers": 4, "expansion_ratio": 2, "max_seq_len": 64}
        return sharpen(transformers.MptForCausalLM(transformers.MptConfig(vocab_size=VOCABULARY, **sizes)))
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PAD,
    }
    if kind == "opt":
        config = transformers.OPTConfig(**sizes, word_embed_proj_dim=WIDTH, ffn_dim=64, dropout=0.0)
        return sharpen(transformers.OPTForCausalLM(config))
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=1)
        return sharpen(transformers.LlamaForCausalLM(config))
    config = transformers.GPTNeoXConfig(**sizes, intermediate_size=48)
    return sharpen(transformers.GPTNeoXForCausalLM(config))


@torch.no_grad()
def sharpen(model, factor=5.0):
    """Matrices scaled up: attention and next-token distributions that are not flat."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(factor)
    return model.eval()


@torch.no_grad()
def open_gates(model, seed=5):
    """Gates away from 0, all different."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_gate", "ff_gate")):
            parameter.uniform_(0.3, 1.0, generator=generator)
    return model


def config(kind="ours", **options):
    if kind == "ours":
        options["language"] = OURS
    else:
        options["language_width"] = WIDTH
    return FlamingoConfig(MEDIA, END, **{"vision": VISION, **SMALL, **options})


def flamingo(kind="ours", language=None, **options):
    """Both parts are given, drawn one after the other: weights at which images decide some tokens."""
    sizes, language = config(kind, **options), language or language_model(kind)
    tower = CLIP(sizes.vision).visual
    return open_gates(Flamingo(sizes, vision_encoder=tower, lang_encoder=language)).eval()


def inputs(seed=0, rows=3, length=14, images=3):
    """Images, and text with image tokens at the start, in the middle, or after other text; row 1 has one."""
    generator = torch.Generator().manual_seed(seed)
    vision_x = torch.randn(rows, images, 1, 3, 16, 16, generator=generator)
    lang_x = torch.randint(3, MEDIA, (rows, length), generator=generator)
    for row in range(rows):
        lang_x[row, row] = MEDIA
        if row != 1:
            lang_x[row, row + 4 : row + 8 : 3] = MEDIA
        lang_x[row, row + 3] = END
    return vision_x, lang_x
