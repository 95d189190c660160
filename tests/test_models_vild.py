"""ViLD: its heads against torch's own operations, its losses and detections, its teacher."""

import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vlmkernels
from tests.detector_tiny import TINY
from tests.parity import close
from vlmkernels.models import ASIF, AnchorTensors
from vlmkernels.models._vild_teacher import crop_embeddings, relative_encoders, text_embeddings, wider
from vlmkernels.models.vild import CONFIGS, VARIANTS, Classes, ViLD, ViLDConfig, ViLDDetector, ViLDHeads

WIDTH, NOVEL = 6, torch.tensor([False, True, False, True])


def model_of(variant, **fields):
    torch.manual_seed(3)
    return ViLD(ViLDConfig(detector=TINY, variant=variant, embed_dim=WIDTH, **fields)).double()


def classes(count=4):
    generator = torch.Generator().manual_seed(count)
    return Classes(torch.randn(count, WIDTH, generator=generator).double(), NOVEL[:count])


def batch(generator=None):
    """Two images, the second without objects, and their proposals with embeddings."""
    generator = generator or torch.Generator().manual_seed(1)

    def numbers(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    images = [numbers(3, 64, 64), numbers(3, 48, 64)]
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 30.0, 60.0, 60.0]]).double()
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 6:40, 4:30] = masks[1, 30:60, 20:60] = True
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks},
        {"boxes": boxes[:0], "labels": torch.zeros(0).long(), "masks": masks[:0, :48]},
    ]
    for target, count in zip(targets, (3, 2), strict=True):
        target["proposals"] = torch.cat([10 * numbers(count, 2), 20 + 20 * numbers(count, 2)], 1)
        target["embeddings"] = numbers(count, WIDTH) - 0.5
    return images, targets


def oracle_logits(projected, table):
    projected = projected / projected.norm(dim=1, keepdim=True)
    return 100 * projected @ (table / table.norm(dim=1, keepdim=True)).T


def test_the_classifier_and_its_gradients_are_those_of_torch():
    heads = model_of("vild").detector.roi_heads
    torch.manual_seed(0)
    pooled, labels = torch.randn(9, TINY.width, 7, 7).double(), torch.tensor([0, 1, 3, 0, 0, 1, 3, 3, 0])
    features = heads.box_head(pooled).detach().requires_grad_()
    total, count = heads.class_losses(pooled, features, labels, classes())["class"]
    leaves = [features, heads.background.embedding, *heads.box_predictor["projection"].parameters()]
    found = torch.autograd.grad(total / count, leaves)

    projected = F.linear(features, *leaves[2:])
    logits = oracle_logits(projected, torch.cat([leaves[1][None], classes().embeddings]))
    logits = logits * (1 - F.pad(NOVEL.double(), (1, 0)))  # 0, not excluded
    loss = F.cross_entropy(logits, labels)
    close(total / count, loss, "loss")
    for got, wanted in zip(found, torch.autograd.grad(loss, leaves), strict=True):
        close(got, wanted, "gradient")


@pytest.mark.parametrize("variant", ["vild", "ensemble"])
def test_distillation_and_its_gradients_are_those_of_torch(variant):
    heads = model_of(variant, distill_weight=0.25).train().detector.roi_heads
    torch.manual_seed(0)
    maps = [torch.randn(2, TINY.width, 64 // s, 64 // s).double().requires_grad_() for s in (4, 8, 16)]
    targets = batch()[1]
    total, count = heads._distillation(maps, [4, 8, 16], targets)["distillation"]
    found = torch.autograd.grad(total / count, maps[0])[0]

    ids = torch.tensor([0.0, 0, 0, 1, 1]).double()[:, None]
    rows = torch.cat([ids, torch.cat([target["proposals"] for target in targets])], 1)
    pooled = vlmkernels.roi_align(maps[0], rows, 7, spatial_scale=0.25, sampling_ratio=2, aligned=False)
    student = F.normalize(heads.image_embeddings(pooled), dim=1)
    teacher = F.normalize(torch.cat([target["embeddings"] for target in targets]), dim=1)
    loss = 0.25 * WIDTH * F.l1_loss(student, teacher)  # of the mean over all numbers
    close(total / count, loss, "loss")
    close(found, torch.autograd.grad(loss, maps[0])[0], "gradient")


def test_scores_of_every_variant_are_those_of_torch():
    torch.manual_seed(1)
    pooled = torch.randn(5, TINY.width, 7, 7).double()
    for variant in VARIANTS:
        heads = model_of(variant).eval().detector.roi_heads
        with torch.no_grad():
            features = heads.box_head(pooled)
            found = heads.scores(pooled, features, classes())
            projected = heads.box_predictor["projection"](features)
            if variant != "image":
                table = torch.cat([heads.background.embedding[None], classes().embeddings])
                text = oracle_logits(projected, table).softmax(1)[:, 1:]
            if variant == "ensemble":
                projected = heads.image_projection(heads.image_head(pooled))
            image = oracle_logits(projected, classes().embeddings).softmax(1)
        if variant == "ensemble":  # the cube root, its third factor by the kind of class
            wanted = (text * image * torch.where(NOVEL, image, text)) ** (1 / 3)
        else:
            wanted = image if variant == "image" else text
        close(found, wanted, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_the_loss_and_what_they_teach(variant):
    model, (images, targets) = model_of(variant).train(), batch()
    if variant == "text":
        targets = [{name: target[name] for name in ("boxes", "labels", "masks")} for target in targets]
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    out = model(images, targets, classes(), generators=generators)
    parts = {"objectness", "rpn_box", "box", "mask"}
    parts |= {"class"} if variant != "image" else set()
    parts |= {"distillation"} if variant != "text" else set()
    assert out.keys() == {"loss", "counts", *(f"{name}_loss" for name in parts)}
    close(out["loss"], sum(out[f"{name}_loss"] for name in parts))
    assert out["counts"].keys() == parts
    assert out["counts"].get("distillation", 5) == 5
    out["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The other stages and levels are those of larger boxes
    assert [name for name in without if "body" not in name and "fpn" not in name] == []
    again = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    assert torch.equal(
        model(images, targets, classes(), generators=again)["objectness_loss"], out["objectness_loss"]
    )


def regions(looks, count):
    """Kinds of regions, and their pooled maps, which have more in common than differs between kinds."""
    kinds = torch.randint(len(looks), (count,))
    return kinds, (1 + 0.1 * (looks[kinds] + torch.randn(count, *looks.shape[1:]))).relu()


@pytest.mark.parametrize(("variant", "least", "most"), [("text", 0.0, 0.3), ("ensemble", 0.9, 1.0)])
def test_a_teacher_adds_classes_without_labels(variant, least, most):
    """Heads of the size that is trained on composites, alone: 4 base classes, 2 novel ones, a background.

    Fails if heads without the teacher name regions of novel classes as well as those with it, if these name
    few, if base classes suffer, or if what they name does not follow the names' embeddings.
    """
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIGS["emoji-tiny"], variant=variant)
    heads = ViLDHeads(config)
    looks = torch.randn(7, config.detector.width, 1, 1) + torch.randn(7, config.detector.width, 7, 7) / 2
    teacher = F.normalize(torch.randn(7, config.embed_dim) + torch.randn(config.embed_dim), dim=1)
    names = Classes(teacher[:6], torch.arange(6) >= 4)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for _ in range(25):
        kinds, pooled = regions(looks, 48)
        total, count = heads.class_losses(
            pooled, heads.box_head(pooled), torch.where(kinds < 4, 1 + kinds, 0), names
        )["class"]
        loss = total / count
        if variant == "ensemble":
            student = heads.image_embeddings(pooled)
            distance = vlmkernels.embedding_distillation(student, teacher[kinds], distance="l1")
            loss = loss + config.distill_weight * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kinds, pooled = regions(looks, 100)
    heads.eval()

    @torch.no_grad()
    def named(classes, wanted):
        found = heads.scores(pooled, heads.box_head(pooled), classes).argmax(1)
        return (found == kinds)[wanted].double().mean().item()

    novel = (kinds >= 4) & (kinds < 6)
    assert least <= named(names, novel) <= most
    assert named(names, kinds < 4) > 0.9
    shuffled = names._replace(embeddings=names.embeddings.roll(1, 0))
    assert named(shuffled, kinds < 4) < 0.3
    assert variant == "text" or named(shuffled, novel) < 0.3


@pytest.mark.parametrize("count", [0, 1])
def test_few_proposals(count):
    """One row has no statistics of a batch; without any, every weight still has a gradient."""
    model, (images, targets) = model_of("ensemble").train(), batch()
    few = [
        {**target, "proposals": target["proposals"][:keep], "embeddings": target["embeddings"][:keep]}
        for target, keep in zip(targets, (count, 0), strict=True)
    ]
    out = model(images, few, classes())
    out["loss"].backward()
    assert bool(out["distillation_loss"] > 0) == (count == 1)
    assert all(p.grad is not None for p in model.detector.roi_heads.parameters())


def test_detections_and_the_saved_model(tmp_path):
    model = model_of("ensemble", base=("cat",)).eval()
    images = [image.float() for image in batch()[0]]
    model = model.float()
    given = Classes(classes().embeddings.float(), NOVEL)
    found = model.detect(images, given)
    assert len(found) == 2
    for each, image in zip(found, images, strict=True):
        assert 1 <= len(each.boxes) <= TINY.detections
        assert each.scores.equal(each.scores.sort(descending=True).values)
        assert 1 <= int(each.labels.min()) <= int(each.labels.max()) <= 4
        assert each.masks.shape == (len(each.boxes), *image.shape[1:])
        assert (each.boxes >= 0).all()
        assert (each.boxes[:, 2:] <= torch.tensor(image.shape[:0:-1])).all()
    model.save_pretrained(tmp_path)
    loaded = ViLD.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for each, other in zip(found, loaded.detect(images, given), strict=True):
        assert all(a.equal(b) for a, b in zip(each, other, strict=True))


def words(texts):
    """An encoder: letters of a text, by their numbers."""
    return torch.stack([torch.tensor([float(text.count(c)) + 0.1 for c in "abcdet"]) for text in texts])


def test_any_categories_of_a_picture():
    model = model_of("ensemble", base=("cat", "dog")).float()
    detector = ViLDDetector(model, words, templates=("a {}", "{}"))
    image = Image.fromarray((batch()[0][1].permute(1, 2, 0) * 255).byte().numpy())
    found = detector(image, categories=["bat", "cat", "date"])
    assert set(found.labels.tolist()) <= {0, 1, 2}
    assert found.masks.shape[1:] == (48, 64)
    assert detector.classes(["bat", "cat"]).novel.tolist() == [True, False]
    alone = detector(image, categories=["bat"])
    assert not alone.labels.any()
    both = F.normalize(words(["a bat", "bat"]), dim=1).mean(0, keepdim=True)
    close(detector.classes(["bat"]).embeddings, F.normalize(both, dim=1), tolerance=1e-6)
    for wrong, message in (
        ([], "categories must be"), ("cat", "categories must be"), (["a", "a"], "must differ, got a more"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            detector(image, categories=wrong)
    with pytest.raises(ValueError, match=r"templates must each have a \{\}"):
        text_embeddings(words, ["cat"], ["no place"])


def test_embeddings_of_crops_are_of_two_sizes():
    image = Image.new("RGB", (40, 30))
    image.paste((255, 0, 0), (10, 10, 20, 20))
    boxes = torch.tensor([[10.0, 10.0, 20.0, 20.0], [0.0, 0.0, 9.5, 9.0]])
    sizes = []

    def encode(crops):
        sizes.extend(crop.size for crop in crops)
        red = torch.tensor([numpy.array(crop)[..., 0].mean() / 255 for crop in crops]).float()
        return torch.stack([red, 1 - red], 1)

    found = crop_embeddings(encode, image, boxes)
    assert sizes == [(10, 10), (10, 9), (16, 16), (12, 12)]
    inside = 100 / 256  # of the larger crop, by whole pixels
    close(found[0], F.normalize(torch.tensor([1 + inside, 1 - inside]), dim=0), tolerance=1e-6)
    assert wider(boxes, (30, 40)).tolist()[0] == [7.5, 7.5, 22.5, 22.5]
    with pytest.raises(ValueError, match="boxes must overlap the image of 40 x 30"):
        crop_embeddings(encode, image, torch.tensor([[50.0, 0.0, 60.0, 10.0]]))


def test_two_encoders_of_an_asif_are_a_teacher():
    torch.manual_seed(0)
    anchors = AnchorTensors(torch.randn(12, 3), torch.randn(12, 6))
    asif = ASIF(lambda images: torch.stack([torch.rand(3) for _ in images]), words, anchors, k=4)
    image, text = relative_encoders(asif)
    assert image([1, 2]).shape == (2, 12)
    assert text_embeddings(text, ["cat", "bat"]).shape == (2, 12)


def test_errors_name_every_argument():
    model, (images, targets) = model_of("vild"), batch()
    with pytest.raises(ValueError, match=r"classes.embeddings must be floating \[C, 6\]"):
        model.detect(images, Classes(torch.zeros(2, 5)))
    with pytest.raises(ValueError, match=r"classes.novel must be bool \[C\] = \[4\], got torch.int64"):
        model.detect(images, Classes(classes().embeddings, NOVEL.long()))
    wrong = [{**targets[0], "embeddings": torch.zeros(3, 2)}, {"boxes": targets[1]["boxes"]}]
    with pytest.raises(ValueError, match=r"targets\[0\]: embeddings must .*; targets\[1\]: must have prop"):
        model(images, wrong, classes())
    flat = {**targets[0], "proposals": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match="proposals must have positive sides"):
        model(images, [flat, targets[1]], classes())
    with pytest.raises(ValueError, match=r"targets\[0\]: labels must be in \[1, 5\)"):
        model(images, [{**targets[0], "labels": torch.tensor([1, 5])}, targets[1]], classes())
    with pytest.raises(ValueError, match=r"variant must be one of .*; detector must be class_agnostic"):
        ViLDConfig(variant="both", detector=dataclasses.replace(TINY, class_agnostic=False))


def test_published_sizes():
    """Parts of the published model by their sizes; no memory for the weights."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in ViLD(CONFIGS["vild-ensemble-r50"]).named_parameters()}
    head = "detector.roi_heads."
    assert shapes[head + "image_projection.weight"] == (512, 1024)
    assert shapes[head + "image_head.5.weight"] == (1024, 256 * 49)
    assert shapes[head + "background.embedding"] == (512,)
    assert shapes[head + "box_predictor.bbox_pred.weight"] == (4, 1024)
    assert shapes[head + "mask_predictor.mask_fcn_logits.weight"] == (1, 256, 1, 1)
