"""CLIP: parity with open_clip and Hugging Face at random weights, published sizes, files, errors."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.models.peer_models import open_clip_model, transformers_clip
from vlmkernels.models.clip import CLIP, CONFIGS, ClipConfig

needs_open_clip = pytest.mark.skipif(
    peers.why_not("open_clip") is not None, reason=str(peers.why_not("open_clip"))
)
needs_transformers = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=str(peers.why_not("transformers"))
)

TEXT = {
    "context_length": 12,
    "vocab_size": 50,
    "text_width": 32,
    "text_layers": 2,
    "text_heads": 4,
    "eot_id": 49,
}
VIT = ClipConfig(
    embed_dim=24, image_size=32, patch_size=8, vision_width=64, vision_layers=2, vision_heads=4, **TEXT
)
RESNET = replace(VIT, vision_layers=(1, 2, 1, 1), vision_width=8, patch_size=None, image_size=64)
HEADS = {"vision_heads": 4, "text_heads": 4}


def inputs(config, rows=6):
    generator = torch.Generator().manual_seed(5)
    size = config.image_size
    images = torch.randn(rows, 3, size, size, generator=generator)
    tokens = torch.randint(1, config.eot_id, (rows, config.context_length), generator=generator)
    for row, length in enumerate(torch.randint(2, config.context_length, (rows,), generator=generator)):
        tokens[row, length] = config.eot_id
        tokens[row, length + 1 :] = 0
    return images, tokens


def randomise(model):
    """Away from initial values that hide faults: zero gains and biases, MLPs with small activations."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("running_mean") or name.endswith("bias"):
                tensor.normal_(0.0, 0.2, generator=generator)
            elif ".mlp." in name:
                tensor.mul_(3.0)
    return model


def assert_same_gradients(ours, theirs):
    """Relative error of every gradient that is more than rounding noise (biases of keys have none)."""
    assert ours.keys() == theirs.keys()
    largest = max(grad.norm() for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, name


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@needs_open_clip
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize("base", [VIT, RESNET], ids=["vit", "resnet"])
def test_equals_open_clip(base, quick_gelu, training):
    config = replace(base, quick_gelu=quick_gelu)
    peer = randomise(open_clip_model(config)).train(training)
    model = CLIP(config).train(training)
    model.load_openai_state_dict(peer.state_dict())
    images, tokens = inputs(config)
    if training and base is RESNET:  # in float32 a ReLU may cut a value of one side alone
        model, peer, images = model.double(), peer.double(), images.double()
    ours, theirs = model(images, tokens), peer(images, tokens)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-5, name
    loss, expected = model.loss(images, tokens), peers.load("open_clip.loss").ClipLoss()(**theirs)
    assert (loss - expected).abs() <= 1e-5 * expected
    loss.backward()
    expected.backward()
    assert_same_gradients(gradients(model), gradients(peer))
    if training:  # BatchNorm's statistics after the same number of forward passes
        peer(images, tokens)
        for name, value in peer.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@needs_open_clip
def test_sigmoid_loss_with_a_logit_bias_equals_open_clip():
    config = replace(VIT, init_logit_scale=math.log(10), init_logit_bias=-10.0)
    peer = randomise(open_clip_model(config, init_logit_scale=math.log(10), init_logit_bias=-10.0))
    model = CLIP.from_openai_state_dict(peer.state_dict(), quick_gelu=False, **HEADS)
    assert model.config.init_logit_bias is not None
    images, tokens = inputs(config)
    theirs = peer(images, tokens)
    assert model(images, tokens).keys() == theirs.keys()
    loss, expected = model.loss(images, tokens), peers.load("open_clip.loss").SigLipLoss()(**theirs)
    assert (loss - expected).abs() <= 1e-5 * expected
    loss.backward()
    expected.backward()
    assert_same_gradients(gradients(model), gradients(peer))


@needs_transformers
@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
def test_equals_hugging_face(quick_gelu, tmp_path):
    config = replace(VIT, quick_gelu=quick_gelu)
    peer = randomise(transformers_clip(config)).eval()
    peer.save_pretrained(tmp_path)
    model = CLIP.from_hf_folder(tmp_path)
    assert replace(model.config, init_logit_scale=config.init_logit_scale) == config
    images, tokens = inputs(config)
    theirs = peer(input_ids=tokens, pixel_values=images, return_loss=True)
    ours = model(images, tokens)
    assert (ours["image_features"] - theirs.image_embeds).abs().max() <= 1e-5
    assert (ours["text_features"] - theirs.text_embeds).abs().max() <= 1e-5
    loss = model.loss(images, tokens)
    assert (loss - theirs.loss).abs() <= 1e-5 * theirs.loss
    loss.backward()
    theirs.loss.backward()
    renamed = CLIP(config)
    renamed.load_weights(
        CLIP.from_hf_state_dict(gradients(peer), quick_gelu=quick_gelu, **HEADS).state_dict()
    )
    assert_same_gradients(gradients(model), dict(renamed.named_parameters()))

    back = transformers_clip(config)
    back.load_state_dict(model.hf_state_dict())
    for name, tensor in peer.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@needs_open_clip
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-L-14-336", "RN50", "RN50x4-quickgelu"])
def test_published_models_equal_open_clip(name):
    torch.manual_seed(1)
    config = CONFIGS[name]
    peer = randomise(open_clip_model(config)).eval()
    model = CLIP(config).eval()
    model.load_openai_state_dict(peer.state_dict())
    images, tokens = inputs(config, rows=2)
    with torch.no_grad():
        ours, theirs = model(images, tokens), peer(images, tokens)
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= 1e-5, key


# Parameter counts of the published models.
COUNTS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B-32": 151_277_313,
    "ViT-B-16": 149_620_737,
    "ViT-L-14": 427_616_513,
    "ViT-L-14-336": 427_944_193,
    "ViT-H-14": 986_109_441,
    "ViT-g-14": 1_366_678_273,
    "ViT-bigG-14": 2_539_567_105,
    "emoji-tiny": 1_780_993,
    "emoji-resnet": 2_303_769,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_sizes(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in CLIP(CONFIGS[name]).parameters())
    base = name.removesuffix("-quickgelu")
    assert CONFIGS[name].quick_gelu == (base != name)
    assert count == COUNTS[base]


def test_initial_weights():
    torch.manual_seed(0)
    model = CLIP(replace(VIT, vocab_size=4000, text_width=128, vision_width=128))
    assert math.isclose(model.logit_scale.item(), math.log(1 / 0.07), rel_tol=1e-6)
    block = model.transformer.resblocks[0]
    stds = {
        model.token_embedding.weight: 0.02,
        model.positional_embedding: 0.01,
        model.text_projection: 128**-0.5,
        model.visual.proj: 128**-0.5,
        block.attn.in_proj_weight: 128**-0.5,
        block.attn.out_proj.weight: 128**-0.5 * 4**-0.5,
        block.mlp.c_fc.weight: 256**-0.5,
        block.mlp.c_proj.weight: 128**-0.5 * 4**-0.5,
    }
    for weight, std in stds.items():
        assert math.isclose(weight.std().item(), std, rel_tol=0.1)
    resnet = CLIP(RESNET).visual
    assert all(block.bn3.weight.eq(0).all() for block in resnet.layer2)


@pytest.mark.parametrize(
    "config", [VIT, RESNET, replace(VIT, init_logit_bias=-10.0)], ids=["vit", "resnet", "bias"]
)
def test_save_and_load(config, tmp_path):
    model = randomise(CLIP(config)).eval()
    model.save_pretrained(tmp_path / "new" / "folder")
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == {"config.json", "model.safetensors"}
    again = CLIP.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == config
    assert not again.training
    images, tokens = inputs(config)
    for name, value in model(images, tokens).items():
        assert torch.equal(again(images, tokens)[name], value)


def edit_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text())
    fields.update(changes)
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "align"}, "model_type must be 'clip' for CLIP, got 'align'"),
        ({"depth": 3}, "unknown fields \\['depth'\\]"),
        ({"text_layers": 3}, "12 missing: transformer.resblocks.2"),
        ({"text_layers": 1}, "12 unknown: transformer.resblocks.1"),
        (
            {"embed_dim": 25},
            "2 of another shape: text_projection must be \\[32, 25\\] by the config, got \\[32, 24\\]",
        ),
    ],
)
def test_loading_a_folder_that_does_not_fit(changes, message, tmp_path):
    CLIP(VIT).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(tmp_path)


def test_all_faults_of_a_state_dict_are_in_one_error():
    state_dict = CLIP(VIT).state_dict()
    state_dict["extra"] = torch.zeros(1)
    state_dict["visual.proj"] = torch.zeros(3, 4)
    del state_dict["ln_final.bias"]
    with pytest.raises(
        ValueError, match=r"1 missing: ln_final.bias; 1 unknown: extra; 1 of another shape: visual.proj"
    ):
        CLIP(VIT).load_weights(state_dict)


def openai_state_dict(config):
    """As in OpenAI's archives: fp16 weights and three buffers with sizes."""
    state_dict = {name: tensor.half() for name, tensor in randomise(CLIP(config)).state_dict().items()}
    sizes = {
        "input_resolution": config.image_size,
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
    }
    return {**state_dict, **{name: torch.tensor(size) for name, size in sizes.items()}}


def test_openai_weights_need_quick_gelu_and_heads_of_64_channels():
    state_dict = openai_state_dict(VIT)
    with pytest.raises(ValueError, match=r"OpenAI's own checkpoint.*QuickGELU.*quick_gelu=False"):
        CLIP(VIT).load_openai_state_dict(state_dict)
    with pytest.raises(ValueError, match=r"vision_heads must be 1, got 4; text_heads must be 1, got 4"):
        CLIP(replace(VIT, quick_gelu=True)).load_openai_state_dict(state_dict)
    own = CLIP.from_openai_state_dict(state_dict).config
    assert (own.quick_gelu, own.vision_heads, own.text_heads) == (True, 1, 1)
    with pytest.raises(ValueError, match="quick_gelu"):
        CLIP.from_openai_state_dict(state_dict, quick_gelu=False)
    model = CLIP(replace(VIT, vision_heads=1, text_heads=1))
    model.load_openai_state_dict(state_dict, check_activation=False)
    assert torch.equal(model.visual.proj, state_dict["visual.proj"].float())
    quick = CLIP.from_openai_state_dict(state_dict)
    images, tokens = inputs(VIT)
    assert not torch.allclose(
        quick(images, tokens)["image_features"], model(images, tokens)["image_features"]
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["dict", "pt", "safetensors", "training checkpoint", "torchscript"])
@pytest.mark.parametrize("base", [VIT, RESNET], ids=["vit", "resnet"])
def test_openai_weights_from_every_kind_of_file(base, form, tmp_path):
    config = replace(base, quick_gelu=True)
    source = state_dict = openai_state_dict(config)
    if form == "pt":
        source = tmp_path / "weights.pt"
        torch.save(state_dict, source)
    elif form == "safetensors":
        source = tmp_path / "weights.safetensors"
        peers.load("safetensors.torch:save_file")(state_dict, source)
    elif form == "training checkpoint":
        source = tmp_path / "epoch_1.pt"
        checkpoint = {f"module.{name}": tensor for name, tensor in state_dict.items()}
        torch.save({"epoch": 1, "name": "run", "state_dict": checkpoint}, source)
    elif form == "torchscript":
        source = tmp_path / "archive.pt"
        root = torch.nn.Module()
        for name, tensor in state_dict.items():
            *path, leaf = name.split(".")
            module = root
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_buffer(leaf, tensor)
        torch.jit.script(root).save(str(source))
    heads = HEADS if base is VIT else {"text_heads": 4}
    model = CLIP.from_openai_state_dict(source, quick_gelu=True, **heads)
    assert replace(model.config, init_logit_scale=config.init_logit_scale) == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state_dict[name].to(tensor.dtype)), name


def test_sources_that_hold_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        CLIP.from_openai_state_dict(tmp_path / "absent.pt", quick_gelu=True)
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must be a state dict"):
        CLIP.from_openai_state_dict(tmp_path / "other.pt", quick_gelu=True)
    with pytest.raises(ValueError, match="state_dict must be a CLIP's, but it has no text_projection"):
        CLIP.from_openai_state_dict({"weight": torch.zeros(1)}, quick_gelu=True)
    with pytest.raises(ValueError, match=r"no place for visual.layer|no place for visual.bn1"):
        CLIP(RESNET).hf_state_dict()


def test_logit_scale_is_clamped():
    model = CLIP(VIT)
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    assert math.isclose(model.scale().item(), 100.0, rel_tol=1e-5)
    model.clamp_logit_scale_()
    assert math.isclose(model.logit_scale.item(), math.log(100), rel_tol=1e-6)
    images, tokens = inputs(VIT)
    model.loss(images, tokens.flip(0)).backward()
    assert model.logit_scale.grad != 0  # at the bound the gradient still acts
    with torch.no_grad():
        model.logit_scale.fill_(-1.0)
    model.clamp_logit_scale_()
    assert model.logit_scale == 0


def test_text_is_pooled_at_the_end_of_text_id():
    config = replace(VIT, eot_id=30)
    model = CLIP(config).eval()
    tokens = torch.tensor([[1, 45, 7, 30, 0, 0], [1, 44, 30, 49, 3, 2]])  # higher ids around it
    out = model.encode_text(tokens)
    torch.testing.assert_close(out[0], model.encode_text(tokens[:1, :4])[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out[1], model.encode_text(tokens[1:, :3])[0], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"rows \[1\] have no end-of-text id 30"):
        model.encode_text(torch.tensor([[1, 30], [1, 2]]))


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_compiles_into_one_graph(config):
    model = CLIP(config).eval()
    images, tokens = inputs(config)
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, tokens), model.loss(images, tokens))


def test_normalize_positives_and_smoothing():
    model = CLIP(VIT).eval()
    images, tokens = inputs(VIT)
    features = model.encode_image(images)
    assert torch.equal(model.encode_image(images, normalize=True), F.normalize(features, dim=-1))
    out = model(images, tokens)
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    target = torch.arange(len(images))
    expected = [F.cross_entropy(part, target, label_smoothing=0.1) for part in (logits, logits.T)]
    torch.testing.assert_close(model.loss(images, tokens, label_smoothing=0.1), sum(expected) / 2)
    ids = target // 2
    target = (ids[:, None] == ids).float() / 2
    expected = [F.cross_entropy(part, target) for part in (logits, logits.T)]
    torch.testing.assert_close(model.loss(images, tokens, positives=(ids, ids)), sum(expected) / 2)
    with pytest.raises(ValueError, match="label_smoothing"):
        CLIP(replace(VIT, init_logit_bias=0.0)).loss(images, tokens, label_smoothing=0.1)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_autocast_to_bf16(config):
    model = randomise(CLIP(config)).eval()
    images, tokens = inputs(config)
    exact = model(images, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(images, tokens)
    for name in ("image_features", "text_features"):
        assert not torch.equal(rough[name], exact[name])
        assert (rough[name] - exact[name]).norm() <= 0.05 * exact[name].norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 7}, "image_size must be a multiple of patch_size 7, got 32"),
        ({"patch_size": None}, "must be a multiple of patch_size None"),
        ({"vision_heads": 5}, "vision_heads must be a divisor of the width 64, got 5"),
        ({"vision_layers": 0}, "vision_layers must be at least 1, got 0"),
        ({"eot_id": 50}, "eot_id must be an id below vocab_size 50, got 50"),
        ({"quick_gelu": "yes"}, "quick_gelu must be True or False, got 'yes'"),
        ({"vision_layers": (1, 1)}, "got \\(1, 1\\); patch_size must be None for a ModifiedResNet, got 8"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(VIT, **changes)


def test_bad_inputs():
    model = CLIP(VIT)
    images, tokens = inputs(VIT)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 32\], got \[6, 3, 32, 16\]"):
        model.encode_image(images[..., :16])
    with pytest.raises(ValueError, match=r"tokens must be \[B, L\] with L <= 12, got \[6, 24\]"):
        model.encode_text(tokens.repeat(1, 2))
    with pytest.raises(ValueError, match="config of CLIP must be a ClipConfig, got dict"):
        CLIP({})
