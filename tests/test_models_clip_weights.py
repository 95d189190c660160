"""CLIP's weights of others: what shapes do not determine is read from a config or must be given."""

import copy
import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import peers
from benchmarks.models.peer_models import transformers_clip
from tests.test_models_clip import VIT, needs_open_clip, needs_transformers, randomise
from vlmkernels.models import CLIP, ClipConfig, _clip_sources
from vlmkernels.models._clip_sources import hf_fields, open_clip_fields
from vlmkernels.models.clip import CONFIGS
from vlmkernels.models.parts.pretrained import config_from_dict
from vlmkernels.testing import assert_as_good

LIST = peers.load("open_clip").list_models() if peers.why_not("open_clip") is None else ()


def open_clip_config(name):
    return peers.load("open_clip").get_model_config(name)


def open_clip_peer(config):
    """open_clip's model of one of its configurations, as its create_model builds it."""
    model = peers.load("open_clip").model
    fields = {name: value for name, value in config.items() if name not in ("custom_text", "multimodal_cfg")}
    build = model.CustomTextCLIP if config.get("custom_text") else model.CLIP
    return build(**fields, output_dict=True)


def tiny(config):
    """A configuration with the same options and two small layers: heads keep their width."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if isinstance(vision["layers"], list):
        vision = {**vision, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 32}
    else:
        width = 2 * vision.get("head_width", 64)
        vision = {**vision, "layers": 2, "width": width, "patch_size": 8, "image_size": 24}
    width = 2 * (text["width"] // text["heads"])
    text = {**text, "layers": 2, "width": width, "heads": 2, "vocab_size": 60, "context_length": 9}
    return {**config, "embed_dim": 24, "vision_cfg": vision, "text_cfg": text}


def write_folder(folder, config, state_dict, name="open_clip_model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save = save_file if name.endswith(".safetensors") else torch.save
    save(state_dict, folder / name)
    return folder


def batch(config, rows=6):
    """Images, and tokens whose end is there once: 3 to 50, then the end, then padding."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(rows, 3, config.image_size, config.image_size, generator=generator)
    tokens = torch.randint(3, 50, (rows, config.context_length), generator=generator)
    for row in range(rows):
        end = 1 + row % (config.context_length - 1)
        tokens[row, end], tokens[row, end + 1 :] = config.eot_id, 0
    return images, tokens


@torch.no_grad()
def assert_same_features(ours, encode_image, encode_text, exact):
    """Features as good as those of a peer, whose features by `exact` are the truth, in float64."""
    images, tokens = batch(ours.config)
    assert_as_good(ours.encode_image(images), encode_image(images), exact[0](images.double()), name="image")
    assert_as_good(ours.encode_text(tokens), encode_text(tokens), exact[1](tokens), name="text")


def assert_same_as_open_clip(ours, peer):
    exact = copy.deepcopy(peer).double()
    assert_same_features(ours, peer.encode_image, peer.encode_text, (exact.encode_image, exact.encode_text))


def why_refused(config):
    """What one of open_clip's own configurations has and a CLIP of ours has not."""
    has = {
        "vision_cfg: timm_model_name": config["vision_cfg"].get("timm_model_name"),
        "vision_cfg: ls_init_value": config["vision_cfg"].get("ls_init_value"),
        "text_cfg: hf_model_name": config["text_cfg"].get("hf_model_name"),
        "model_cfg: multimodal_cfg": config.get("multimodal_cfg"),
    }
    return [name for name, value in has.items() if value]


@needs_open_clip
@pytest.mark.parametrize("name", LIST)
def test_each_configuration_of_open_clip_is_expressed_or_refused(name):
    """Names and shapes at full width, without memory."""
    config = open_clip_config(name)
    if reasons := why_refused(config):
        with pytest.raises(ValueError) as refusal:
            open_clip_fields(config)
        assert all(reason in str(refusal.value) for reason in reasons)
        return
    fields = open_clip_fields(config)
    if name in CONFIGS:
        assert config_from_dict(ClipConfig, fields) == CONFIGS[name]
    layers = {"layers": 2} if isinstance(config["vision_cfg"]["layers"], int) else {}
    config |= {
        "vision_cfg": {**config["vision_cfg"], **layers},
        "text_cfg": {**config["text_cfg"], "layers": 2},
    }
    with torch.device("meta"):
        peer, ours = open_clip_peer(config), CLIP(config_from_dict(ClipConfig, open_clip_fields(config)))
    ours.check_weights(peer.state_dict())


@needs_open_clip
def test_each_family_of_open_clip_computes_the_same(tmp_path):
    """Every configuration that is not refused, cut down: what differs then besides sizes."""
    families = {}
    for name in LIST:
        config = open_clip_config(name)
        if not why_refused(config):
            families.setdefault(json.dumps(tiny(config), sort_keys=True), (name, tiny(config)))
    assert len(families) >= 10
    for name, config in families.values():
        torch.manual_seed(3)
        peer = randomise(open_clip_peer(config)).eval()
        folder = write_folder(tmp_path / name, config, peer.state_dict())
        assert_same_as_open_clip(CLIP.from_open_clip_folder(folder), peer)


@pytest.mark.sampled(3)
@needs_open_clip
@pytest.mark.parametrize("name", ["ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-H-14-CLIPA"])
def test_large_models_with_one_layer(name, tmp_path):
    config = open_clip_config(name)
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    config["text_cfg"]["vocab_size"] = 60
    config["vision_cfg"]["image_size"] = 28
    peer = randomise(open_clip_peer(config)).eval()
    folder = write_folder(tmp_path / "model", config, peer.state_dict())
    assert_same_as_open_clip(CLIP.from_open_clip_folder(folder), peer)


@needs_open_clip
def test_the_defaults_of_open_clip_are_known():
    model = peers.load("open_clip.model")
    for peer, read, fixed in (
        (model.CLIPVisionCfg, _clip_sources.VISION, _clip_sources.VISION_FIXED),
        (model.CLIPTextCfg, _clip_sources.TEXT, _clip_sources.TEXT_FIXED),
    ):
        defaults = dataclasses.asdict(peer())
        assert {name: defaults[name] for name in read} == read
        assert {name: defaults[name] for name in fixed} == fixed
        assert defaults.keys() - read.keys() - fixed.keys() <= {*_clip_sources.IGNORED, "final_ln_after_pool"}


@needs_transformers
def test_the_defaults_of_hugging_face_are_known():
    transformers = peers.load("transformers")
    for peer, read in (
        (transformers.CLIPTextConfig, _clip_sources.HF_TEXT),
        (transformers.CLIPVisionConfig, _clip_sources.HF_VISION),
    ):
        assert {name: getattr(peer(), name) for name in read} == read
    assert config_from_dict(ClipConfig, hf_fields({"model_type": "clip"})) == CONFIGS["ViT-B-32-quickgelu"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"multimodal_cfg": {"width": 8}},
            "model_cfg: multimodal_cfg must be None, got {'width': 8}",
        ),
        (
            {"vision_cfg": {"timm_model_name": "x"}, "text_cfg": {"qk_norm": True}},
            "timm_model_name.*qk_norm must be False, got True",
        ),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type must be .* with final_ln_after_pool, got 'avg'"),
        (
            {"vision_cfg": {"norm_kwargs": {"elementwise_affine": False}}},
            "norm_kwargs must be null or contain only eps, got",
        ),
        ({"vision_cfg": {"image_size": [224, 112]}}, "image_size must be one number, got .224, 112."),
        (
            {"text_cfg": {"hf_tokenizer_name": "x"}},
            "pool_type must be .*only in CLIP's vocabulary.*, got 'argmax'",
        ),
        ({"text_cfg": {"pool_type": "first"}}, "pool_type must be .*, got 'first'"),
        ({"text_cfg": {"rotary": True}}, "text_cfg: unknown key rotary"),
        ({"text_cfg": {"proj_bias": True}}, "proj_bias must be False, got True"),
        ({"text_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs"),
        ({"text_cfg": None}, "text_cfg must be an object, got None"),
        ({"quick_gelu": "no"}, "quick_gelu must be a value like False, got 'no'"),
        (
            {"vision_cfg": {"width": "wide", "mlp_ratio": 1e9}},
            "width must be a value like 768, got 'wide'; .*mlp_ratio",
        ),
        ({"vision_cfg": {"head_width": 0}}, "head_width must be 1 or more, got 0"),
    ],
)
def test_what_a_config_of_open_clip_may_not_say(changes, message):
    with pytest.raises(ValueError, match=message):
        open_clip_fields({"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, "model_type must be 'clip', got 'siglip'"),
        (
            {"text_config": {"hidden_act": "gelu"}},
            "hidden_act must be .*in vision_config .'quick_gelu'.*, got 'gelu'",
        ),
        (
            {"text_config": {"hidden_act": "relu"}, "vision_config": {"hidden_act": "relu"}},
            "hidden_act must be .*, got 'relu'",
        ),
        ({"text_config": {"eos_token_id": [1, 2]}}, "eos_token_id must be a value like 49407, got .1, 2."),
        ({"vision_config": {"num_channels": 1}}, "num_channels must be 3, got 1"),
        ({"vision_config": {"patch_size": [16, 8]}}, "patch_size must be one number, got .16, 8."),
        ({"vision_config": [3]}, "vision_config must be an object, got .3."),
    ],
)
def test_what_a_config_of_hugging_face_may_not_say(changes, message):
    with pytest.raises(ValueError, match=message):
        hf_fields({"model_type": "clip", **changes})


def test_an_old_config_of_hugging_face_that_has_a_tower_twice():
    """transformers takes the second, with its defaults, before the first."""
    fields = {
        "text_config": {"num_attention_heads": 4, "hidden_size": 64},
        "text_config_dict": {"hidden_size": 128},
    }
    read = hf_fields({"model_type": "clip", **fields, "vision_config_dict": None})
    assert (read["text_width"], read["text_heads"], read["vision_width"]) == (128, 8, 768)


def hf_peer():
    """A CLIPModel in which everything that shapes do not determine is unusual."""
    peer = transformers_clip(VIT)
    config = peer.config
    config.text_config.layer_norm_eps, config.vision_config.layer_norm_eps = 0.03, 0.2
    config.text_config.intermediate_size, config.vision_config.intermediate_size = 40, 56
    config.text_config.num_attention_heads, config.vision_config.num_attention_heads = 8, 2
    return randomise(type(peer)(config)).eval()


def assert_same_as_hugging_face(ours, peer):
    def encoders(model):
        return (
            lambda images: model.get_image_features(pixel_values=images).pooler_output,
            lambda tokens: model.get_text_features(input_ids=tokens).pooler_output,
        )

    assert_same_features(ours, *encoders(peer), encoders(copy.deepcopy(peer).double()))


@needs_transformers
@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_a_folder_of_hugging_face_computes_the_same(form, tmp_path):
    peer = hf_peer()
    peer.save_pretrained(tmp_path, max_shard_size="30KB" if form == "sharded safetensors" else "1GB")
    assert (tmp_path / "model.safetensors").is_file() == (form != "sharded safetensors")
    if form.endswith("bin"):
        (tmp_path / "model.safetensors").unlink()
        parts = {"pytorch_model.bin": peer.state_dict()}
        if form == "sharded bin":
            items = list(peer.state_dict().items())
            parts = {f"pytorch_model-{i}.bin": dict(items[i::3]) for i in range(3)}
            index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, part in parts.items():
            torch.save(part, tmp_path / file)
    assert_same_as_hugging_face(CLIP.from_hf_folder(tmp_path), peer)


@needs_transformers
def test_a_file_of_hugging_face_has_its_config_beside_it(tmp_path):
    peer = hf_peer()
    peer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert_same_as_hugging_face(CLIP.from_hf_state_dict(file), peer)
    assert CLIP.from_hf_folder(tmp_path, text_heads=2).config.text_heads == 2  # what is given comes first
    for source in (peer.state_dict(), file.rename(tmp_path.parent / "alone.safetensors")):
        with pytest.raises(
            ValueError, match="quick_gelu, vision_heads, text_heads: not determined by shapes"
        ):
            CLIP.from_hf_state_dict(source)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 1  # transformers would leave out the others in silence
    (tmp_path / "config.json").write_text(json.dumps(config))
    peer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"other: state_dict does not match CLIP: 12 unknown: .*resblocks\.1"
    ):
        CLIP.from_hf_folder(tmp_path / "other")


WIDE_HEADS = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "layers": 2,
        "width": 160,
        "head_width": 80,
        "mlp_ratio": 2.5,
        "patch_size": 8,
        "image_size": 24,
    },
    "text_cfg": {"layers": 1, "width": 64, "heads": 4, "vocab_size": 60, "context_length": 9},
}
CLIPA = {
    **WIDE_HEADS,
    "vision_cfg": {
        **WIDE_HEADS["vision_cfg"],
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
    },
    "text_cfg": {**WIDE_HEADS["text_cfg"], "no_causal_mask": True, "pool_type": "last"},
}


@needs_open_clip
@pytest.mark.parametrize("file", _clip_sources.OPEN_CLIP_WEIGHTS)
def test_a_file_of_open_clip_has_its_config_beside_it(file, tmp_path):
    peer = randomise(open_clip_peer(WIDE_HEADS)).eval()
    write_folder(tmp_path, WIDE_HEADS, peer.state_dict(), file)
    for model in (CLIP.from_open_clip_folder(tmp_path), CLIP.from_openai_state_dict(tmp_path / file)):
        assert_same_as_open_clip(model, peer)
    with pytest.raises(ValueError, match=r"quick_gelu: .*open_clip_config.json was trained with QuickGELU"):
        CLIP.from_openai_state_dict(tmp_path / file, quick_gelu=False)
    model = CLIP(replace(model.config, vision_heads=5))
    with pytest.raises(
        ValueError, match=r"config.json does not match this config: vision_heads must be 2, got 5"
    ):
        model.load_openai_state_dict(tmp_path / file)


@needs_open_clip
def test_what_shapes_do_not_determine_must_be_given():
    peer = randomise(open_clip_peer(WIDE_HEADS)).eval()
    with pytest.raises(ValueError, match=r"^vision_heads, text_heads: not determined by shapes"):
        CLIP.from_openai_state_dict(peer.state_dict(), quick_gelu=True)
    model = CLIP.from_openai_state_dict(peer.state_dict(), quick_gelu=True, vision_heads=2, text_heads=4)
    assert_same_as_open_clip(model, peer)
    clipa = randomise(open_clip_peer(CLIPA)).eval()
    with pytest.raises(ValueError, match=r"^vision_pool, text_pool, text_causal: not determined by shapes"):
        CLIP.from_openai_state_dict(clipa.state_dict(), quick_gelu=True, vision_heads=2, text_heads=4)
    options = {"vision_pool": "mean", "text_pool": "last", "text_causal": False}
    model = CLIP.from_openai_state_dict(
        clipa.state_dict(), quick_gelu=True, vision_heads=2, text_heads=4, **options
    )
    assert_same_as_open_clip(model, clipa)
    with pytest.raises(ValueError, match=r"tokens must be \[B, L\] with L = 9, got \[1, 5\]"):
        model.encode_text(torch.ones(1, 5, dtype=torch.int64))


def test_clipa_compiles_into_one_graph():
    clipa = {"vision_ln_pre": False, "vision_pool": "mean", "text_pool": "last", "text_causal": False}
    model = CLIP(replace(VIT, **clipa)).eval()
    images, tokens = batch(model.config)
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, tokens), model.loss(images, tokens))


def test_a_folder_without_a_config(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json: no such file"):
        CLIP.from_open_clip_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        CLIP.from_hf_folder(tmp_path)
    write_folder(tmp_path / "empty", WIDE_HEADS, {}, "README.md")
    with pytest.raises(FileNotFoundError, match=r"must contain one of open_clip_model"):
        CLIP.from_open_clip_folder(tmp_path / "empty")


def test_saved_before_a_field_came(tmp_path):
    """A config.json without the later fields means their defaults; without any other it is refused."""
    CLIP(VIT).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    later = ("vision_mlp_width", "vision_eps", "text_pool", "vision_ln_pre")
    path.write_text(json.dumps({name: value for name, value in fields.items() if name not in later}))
    assert CLIP.from_pretrained(tmp_path).config == VIT
    path.write_text(json.dumps({name: value for name, value in fields.items() if name != "quick_gelu"}))
    with pytest.raises(ValueError, match=r"config.json: ClipConfig: .* missing fields \['quick_gelu'\]"):
        CLIP.from_pretrained(tmp_path)


def test_weights_of_integers_are_not_taken_for_numbers():
    state_dict = CLIP(VIT).state_dict()
    state_dict["visual.proj"] = state_dict["visual.proj"].to(torch.int8)
    with pytest.raises(ValueError, match=r"1 not floating: visual.proj is torch.int8"):
        CLIP(VIT).load_weights(state_dict)
