"""The linear probe: its classifier, its metrics, its data, the command."""

import json

import numpy
import pytest
import torch
from PIL import Image

from tests.train_tiny import tiny_values, write_pairs
from vlmkernels.cli import main
from vlmkernels.data import load_scenes
from vlmkernels.train import TrainConfig, load_bundle, train
from vlmkernels.use import probe as module
from vlmkernels.use.probe import Examples, average_precision, linear_probe, probe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finals(tmp_path_factory):
    """Folders of trained models; two steps make no good features."""
    folder = tmp_path_factory.mktemp("runs")
    table, made = write_pairs(folder), {}
    for kind in ("virtex", "clip", "align", "simvlm"):
        config = TrainConfig(**tiny_values(table, folder / kind, kind, max_steps=2))
        made[kind] = str(train(kind, config).final)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pictures of three colours, of noise about each: a folder for each colour."""
    folder = tmp_path_factory.mktemp("colours")
    generator = numpy.random.default_rng(0)
    for name, colour in (("red", (220, 40, 40)), ("green", (40, 200, 40)), ("blue", (40, 40, 220))):
        (folder / name).mkdir()
        for i in range(20):
            noise = generator.normal(0, 20, (16, 16, 3))
            pixels = numpy.clip(numpy.array(colour) + noise, 0, 255).astype(numpy.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def one_hot(labels, classes):
    return torch.nn.functional.one_hot(labels, classes).double()


def test_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.5], [0.7, 0.5], [0.6, 0.2]])
    targets = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 0]]).double()
    # Class 0 at ranks 1 and 3; class 1 shares its score with another image, which comes first.
    assert average_precision(scores, targets).tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 2])
    assert average_precision(torch.zeros(3, 1), torch.zeros(3, 1))[0].isnan()


def test_the_classifier_is_the_minimum_of_its_loss():
    """Its gradient is zero, for one class an image and for several."""
    torch.manual_seed(0)
    features = torch.randn(60, 5, dtype=torch.float64)
    several = (features @ torch.randn(5, 3, dtype=torch.float64) > 0.5).double()
    for targets in (one_hot(torch.randint(0, 3, (60,)), 3), several):
        examples = Examples(features, targets)
        weights = module._fit(examples, 0.1).requires_grad_()
        loss = module._loss(weights, examples) + 0.05 * weights[:-1].square().sum()
        (gradient,) = torch.autograd.grad(loss, weights)
        assert gradient.abs().max() < 1e-5


def test_a_probe_finds_what_is_linear_and_nothing_in_noise():
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (400,))
    centres = torch.randn(4, 6, dtype=torch.float64)
    near = 5 * centres[labels] + torch.randn(400, 6, dtype=torch.float64) + 100
    near[:, 3] = 7.0  # a constant feature
    noise = torch.randn(400, 6, dtype=torch.float64)
    found = {}
    for name, features in (("near", near), ("noise", noise)):
        every = Examples(features, one_hot(labels, 4))
        first, rest = torch.arange(100), torch.arange(100, 400)
        found[name] = linear_probe(every.part(rest), every.part(first))
        assert found[name]["metric"] == "accuracy"
    assert found["near"]["score"] > 0.95
    assert abs(found["noise"]["score"] - found["noise"]["chance"]) < 0.15
    assert found["noise"]["weight_decay"] > found["near"]["weight_decay"]


@pytest.mark.parametrize("kind", ["virtex", "clip", "align"])
def test_probes_of_every_kind_with_features(finals, folders, kind):
    model, _, transform = (getattr(load_bundle(finals[kind]), n) for n in ("model", "tokenizer", "transform"))
    result = probe(finals[kind], str(folders), device="cpu", batch_size=7)
    assert (result.samples, result.train_samples, result.classes) == (12, 48, 3)
    assert result.metric == "accuracy"
    assert result.score > 0.9  # colours are linear in nearly any features
    assert not result.untrained
    image = transform(Image.open(folders / "red" / "0.png"))
    features = model.features if kind == "virtex" else model.encode_image
    with torch.no_grad():
        assert features(image[None]).shape == (1, result.features)
    assert probe(finals[kind], str(folders), device="cpu", batch_size=50).score == result.score


def test_several_classes_an_image_on_scenes(finals):
    scenes = load_scenes("train", size=60), load_scenes("test", size=40)
    result = probe(finals["virtex"], *scenes, device="cpu")
    assert (result.samples, result.train_samples, result.classes) == (40, 60, 24)
    assert result.metric == "mean average precision"
    assert 0.05 < result.chance < 0.2
    assert "24 classes: mean average precision 0." in str(result)


def test_untrained_network_has_its_own_weights_and_statistics(finals, folders, monkeypatch):
    seen = []

    def listening(train, held_out, **options):
        seen.append(train.features)
        return linear_probe(train, held_out, **options)

    monkeypatch.setattr(module, "linear_probe", listening)
    for seed in (0, 0, 1):
        result = probe(finals["virtex"], str(folders), str(folders), untrained=True, seed=seed, device="cpu")
        assert result.untrained
        assert "untrained network" in str(result)
    probe(finals["virtex"], str(folders), str(folders), device="cpu")
    assert seen[0].equal(seen[1])
    assert not seen[0].equal(seen[2])
    assert not seen[0].equal(seen[3])


def test_batch_statistics_are_those_of_the_images(finals, folders):
    bundle = load_bundle(finals["virtex"])
    options = {"limit": None, "batch_size": 60, "skipped": {}, "transform": bundle.transform}
    module._estimate_statistics(bundle.model, module.open_data(folders), **options)
    samples = list(module.readable(module.open_data(folders), bundle.transform, {}))
    images = torch.stack([sample["image"] for sample in samples])
    with torch.no_grad():
        first = bundle.model.visual.conv1(images)
    norm = bundle.model.visual.bn1
    torch.testing.assert_close(norm.running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, first.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert not bundle.model.training
    assert not any(part.training for part in bundle.model.modules())


def test_probe_command(finals, folders, capsys):
    arguments = ["probe", finals["virtex"], "--data", str(folders), "--device", "cpu", "--limit", "50"]
    found = []
    for more in ([], ["--untrained", "--seed", "3"]):
        main([*arguments, *more, "--json"])
        found.append(json.loads(capsys.readouterr().out))
    assert [each["untrained"] for each in found] == [False, True]
    assert [each["samples"] + each["train_samples"] for each in found] == [50, 50]
    main(arguments)
    out = capsys.readouterr().out
    assert out.startswith(
        "40 training samples, 10 samples held out\nlinear probe on 64 features of a trained"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{simvlm}", "--data", "scenes"], "must be of type clip or align or virtex, got simvlm"),
        (["{virtex}", "--data", "{table}"], "data: a probe needs classes: scenes, emoji3 or a folder of"),
        (["{virtex}", "--data", "scenes", "--limit", "0"], "limit must be at least 1 or None, got 0"),
        (["{virtex}", "--data", "{folders}", "--limit", "5"], "a probe needs 10 samples for training"),
        (["{virtex}", "--data", "{folders}", "--test", "scenes:test", "--limit", "9"], "the same classes"),
        (["nowhere", "--data", "scenes"], "folder nowhere does not exist"),
    ],
)
def test_wrong_use_is_one_error(finals, folders, tmp_path, arguments, message, capsys):
    names = {**finals, "table": str(write_pairs(tmp_path)), "folders": str(folders)}
    with pytest.raises(SystemExit) as error:
        main(["probe", *(argument.format(**names) for argument in arguments), "--device", "cpu"])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
