"""image_transform against open_clip's, align_transform against transformers', and the augmentation."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from benchmarks import peers
from vlmkernels.data import (
    CLIP_MEAN,
    CLIP_STD,
    ImageTransform,
    ImageViews,
    align_transform,
    image_transform,
    load_emoji3,
)

SIZES = [(224, 224), (48, 48), (37, 130), (130, 37), (300, 299), (1, 50), (640, 427)]


def picture(size, mode="RGB", seed=0):
    """Noise over a gradient: resampling and rounding differences show."""
    rng = np.random.default_rng(seed)
    width, height = size
    ramp = np.linspace(0, 200, width)[None, :, None] + np.zeros((height, 1, 4))
    pixels = (ramp + rng.integers(0, 56, (height, width, 4))).astype(np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def open_clip_transform(size, **settings):
    if peers.why_not("open_clip"):
        pytest.skip(peers.why_not("open_clip"))
    transform = peers.load("open_clip").transform
    return transform.image_transform_v2(transform.PreprocessCfg(size=size, **settings), is_train=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [224, 48, 33])
def test_inference_equals_open_clip(size, target):
    image = picture(size)
    ours = image_transform(target)(image)
    assert ours.shape == (3, target, target)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, open_clip_transform(target)(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_image_modes_equal_open_clip(mode):
    image = picture((90, 61), mode)
    assert torch.equal(image_transform(48)(image), open_clip_transform(48)(image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_modes_equal_open_clip(size, resize_mode, interpolation):
    image = picture(size)
    settings = {"resize_mode": resize_mode, "interpolation": interpolation}
    theirs = open_clip_transform(56, fill_color=9, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), **settings)
    ours = image_transform(56, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), fill=9, **settings)
    if resize_mode == "longest" and min(size) == 1:
        assert ours(image).shape == (3, 56, 56)  # open_clip's resize fails: it rounds a side to 0
    else:
        assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("size", SIZES[:5])
def test_non_square_target_equals_open_clip(size):
    image = picture(size)
    assert torch.equal(image_transform((40, 72))(image), open_clip_transform((40, 72))(image))


def align_peer(backend):
    name = f"transformers.models.efficientnet.image_processing_{backend}"
    if peers.why_not(name):
        pytest.skip(peers.why_not(name))
    module = peers.load(name)
    suffix = "Pil" if "pil" in backend else ""
    return getattr(module, f"EfficientNetImageProcessor{suffix}")(
        size={"height": 346, "width": 346},
        crop_size={"height": 289, "width": 289},
        resample=2,
        do_center_crop=True,
        do_normalize=False,
        include_top=False,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
    )


@pytest.mark.parametrize("size", SIZES)
def test_align_equals_transformers(size):
    image = picture(size)
    ours = align_transform()(image)
    assert ours.shape == (3, 289, 289)
    theirs = align_peer("pil_efficientnet")(image, return_tensors="pt")["pixel_values"][0]
    assert (ours - theirs).abs().max() < 1e-6


def test_align_equals_transformers_on_tensors():
    """The processor that resizes tensors rounds differently: at most one of the 255 levels."""
    image = picture((640, 427))
    theirs = align_peer("efficientnet")(image, return_tensors="pt")["pixel_values"][0]
    assert (align_transform()(image) - theirs).abs().max() < 1.01 / 127.5


def test_config_round_trip():
    transform = image_transform((40, 50), train=True, crop_scale=(0.5, 1.0), flip=0.5, jitter=0.2)
    again = ImageTransform.from_dict(json.loads(json.dumps(transform.to_dict())))
    assert again == transform
    assert transform.for_inference() == image_transform((40, 50), crop_scale=(0.5, 1.0), flip=0.5, jitter=0.2)
    with pytest.raises(ValueError, match=r"values must be a dict with keys among .*, got \['sise'\]"):
        ImageTransform.from_dict({"sise": 3})


def test_training_is_seeded():
    image = picture((64, 48))
    transform = image_transform(32, train=True, crop_scale=(0.3, 1.0), flip=0.5, jitter=0.3)
    first = transform(image, random.Random(1))
    assert torch.equal(first, transform(image, random.Random(1)))
    assert not torch.equal(first, transform(image, random.Random(2)))
    torch.manual_seed(5)
    from_torch = transform(image)
    torch.manual_seed(5)
    assert torch.equal(from_torch, transform(image))
    assert not torch.equal(from_torch, transform(image))


def test_training_without_randomness_is_a_plain_resize():
    image = picture((64, 64))
    train = image_transform(32, train=True, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert torch.equal(train(image), image_transform(32)(image))
    mirrored = image_transform(32, train=True, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=1.0)
    assert torch.equal(mirrored(image), train(image).flip(-1))


def test_random_crops_stay_in_the_given_range():
    """The red channel is x, the green one y: their extent gives the box back."""
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    transform = image_transform(
        200,
        (0, 0, 0),
        (1, 1, 1),
        train=True,
        crop_scale=(0.25, 0.5),
        crop_ratio=(0.5, 2.0),
        interpolation="nearest",
    )
    areas, ratios, lefts = [], [], []
    for seed in range(60):
        pixels = transform(image, random.Random(seed)) * 255
        width, height = (pixels[c].max() - pixels[c].min() + 1 for c in (0, 1))
        areas.append(float(width * height) / 200**2)
        ratios.append(float(width / height))
        lefts.append(float(pixels[0].min()))
    assert 0.24 < min(areas) < 0.3
    assert 0.45 < max(areas) < 0.51
    assert 0.48 < min(ratios) < 0.7
    assert 1.4 < max(ratios) < 2.05
    assert len(set(lefts)) > 20


def test_crop_falls_back_to_the_centre_of_a_narrow_image():
    transform = image_transform(
        16, (0, 0, 0), (1, 1, 1), train=True, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)
    )
    image = Image.fromarray(np.repeat(np.arange(200, dtype=np.uint8)[None], 10, 0))
    pixels = transform(image, random.Random(0))[0] * 255
    assert pixels.min() >= 94
    assert pixels.max() <= 106


def test_jitter_keeps_the_picture_recognisable():
    image = picture((48, 48))
    plain = image_transform(48, train=True, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))(image)
    jitter = image_transform(48, train=True, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), jitter=0.1)
    for seed in range(10):
        changed = jitter(image, random.Random(seed))
        assert not torch.equal(changed, plain)
        assert torch.corrcoef(torch.stack([changed.flatten(), plain.flatten()]))[0, 1] > 0.95


WHOLE = {
    "train": True,
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "mean": (0, 0, 0),
    "std": (1, 1, 1),
}


def pale():
    """A picture whose colours no change takes out of 0-255."""
    return Image.fromarray(np.random.default_rng(0).integers(90, 160, (48, 48, 3), dtype=np.uint8))


def drawn_after_the_crop(seed, count, least, most):
    """The numbers that the colours of a transform with seed `seed` draw."""
    rng = random.Random(seed)
    image_transform(48, **WHOLE)(pale(), rng)
    return [rng.uniform(least, most) for _ in range(count)]


def test_jitter_is_pillows_brightness_contrast_and_saturation():
    jitter, plain = image_transform(48, **WHOLE, jitter=0.3), image_transform(48, **WHOLE)
    for seed in range(10):
        changed = pale()
        for enhance, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color),
            drawn_after_the_crop(seed, 3, 0.7, 1.3),
            strict=True,
        ):
            changed = enhance(changed).enhance(factor)
        difference = jitter(pale(), random.Random(seed)) - plain(changed)
        assert difference.abs().max() <= 3.5 / 255  # Pillow rounds down, three times


def test_hues_turn_and_the_luma_stays():
    hue, plain = image_transform(48, **WHOLE, hue=0.2), image_transform(48, **WHOLE)(pale())
    luma = torch.tensor([0.299, 0.587, 0.114])

    def chroma(pixels):  # in the plane of I and Q
        i, q = torch.tensor([0.595716, -0.274453, -0.321263]), torch.tensor([0.211456, -0.522591, 0.311135])
        return torch.complex(*(torch.einsum("c,chw->hw", axis, pixels) for axis in (i, q)))

    for seed in range(10):
        turned = hue(pale(), random.Random(seed))
        (part,) = drawn_after_the_crop(seed, 1, -0.2, 0.2)
        assert torch.einsum("c,chw->hw", luma, turned - plain).abs().max() <= 1 / 255
        expected = chroma(plain) * torch.exp(torch.tensor(2j * torch.pi * part))
        assert (chroma(turned) - expected).abs().max() <= 1 / 255


def test_grayscale_drops_the_colours_of_some_pictures():
    transform, plain = image_transform(48, **WHOLE, grayscale=0.5), image_transform(48, **WHOLE)
    results = [transform(pale(), random.Random(seed)) for seed in range(20)]
    grey = plain(pale().convert("L").convert("RGB"))
    dropped = [bool((result - grey).abs().max() <= 1 / 255) for result in results]
    assert 4 <= sum(dropped) <= 16
    kept = [result for result, is_grey in zip(results, dropped, strict=True) if not is_grey]
    assert all(torch.equal(result, plain(pale())) for result in kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size must be a positive int or .*, got 0"),
        ({"image_size": 8, "resize_size": -1}, "resize_size must be a positive int or .*, got -1"),
        ({"image_size": 8, "mean": (0.5,)}, "mean and std must have 3 values"),
        ({"image_size": 8, "std": (1, 1, 0)}, "std > 0"),
        ({"image_size": 8, "interpolation": "area"}, "interpolation must be one of .*, got 'area'"),
        ({"image_size": 8, "resize_mode": "crop"}, "resize_mode must be one of .*, got 'crop'"),
        ({"image_size": 8, "crop_scale": (0.5, 1.5)}, "crop_scale must satisfy 0 < low <= high <= 1, got"),
        ({"image_size": 8, "crop_ratio": (2, 1)}, "crop_ratio must satisfy 0 < low <= high, got"),
        ({"image_size": 8, "flip": 2}, "flip must be a probability, got 2"),
        ({"image_size": 8, "jitter": 1}, r"jitter must be in \[0, 1\), got 1"),
        ({"image_size": 8, "hue": 0.6}, r"hue must be in \[0, 0.5\], got 0.6"),
        ({"image_size": 8, "grayscale": -1}, "grayscale must be a probability, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_transform(**arguments)


def test_not_an_image():
    with pytest.raises(ValueError, match=r"image must be a PIL\.Image, got a Tensor"):
        image_transform(8)(torch.zeros(3, 8, 8))


def test_views_show_the_same_part_of_an_image():
    """The mean colour of quarters of the crop is the same in all sizes, and differs from draw to draw."""
    drawn = {"train": True, "crop_scale": (0.2, 0.5), "flip": 0.5, "jitter": 0.3}
    small, large = (image_transform(size, (0, 0, 0), (1, 1, 1), **drawn) for size in (8, 32))
    views, ramp = ImageViews((small, large)), picture((64, 64))
    seen = set()
    for seed in range(6):
        first, second = views(ramp, random.Random(seed))
        assert first.equal(small(ramp, random.Random(seed)))
        assert second.equal(large(ramp, random.Random(seed)))
        quarters = [torch.nn.functional.avg_pool2d(view, view.shape[-1] // 2) for view in (first, second)]
        torch.testing.assert_close(*quarters, rtol=0, atol=0.02)
        seen.add(round(quarters[0][0, 0, 0].item(), 2))
    assert len(seen) > 3
    assert views.to_dict() == {"transforms": [small.to_dict(), large.to_dict()]}
    torch.manual_seed(0)
    again = views(ramp)
    torch.manual_seed(0)
    assert all(a.equal(b) for a, b in zip(views(ramp), again, strict=True))


def test_data_sets_give_views_their_random_numbers():
    drawn = image_transform(8, train=True, crop_scale=(0.2, 0.5))
    alone, views = load_emoji3(transform=drawn), load_emoji3(transform=ImageViews((drawn, drawn)))
    for image in views[3]["image"]:
        assert image.equal(alone[3]["image"])


def test_constants_are_those_of_open_clip():
    if peers.why_not("open_clip"):
        pytest.skip(peers.why_not("open_clip"))
    constants = peers.load("open_clip").constants
    assert constants.OPENAI_DATASET_MEAN == CLIP_MEAN
    assert constants.OPENAI_DATASET_STD == CLIP_STD


def test_photographs():
    """Real photographs through both libraries; their pixels are neither smooth nor noise."""
    folder = os.environ.get("VLMKERNELS_PHOTOS")
    if not folder:
        pytest.skip("VLMKERNELS_PHOTOS is not set to a folder with photographs")
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    assert paths, f"no photographs in {folder}"
    theirs, ours = open_clip_transform(224), image_transform(224)
    for path in paths:
        with Image.open(path) as image:
            pixels = ours(image)
            assert torch.equal(pixels, theirs(image)), path.name
            assert pixels.std() > 0.2, f"{path.name} is blank"


def test_caption_flip_swaps_the_sides_with_the_image():
    image = picture((40, 30))
    text = "Left of the BRIGHT lefty is what is right: LEFT and right-hand."
    mirrored = "Right of the BRIGHT lefty is what is left: RIGHT and left-hand."
    options = {"train": True, "flip": 0.5, "jitter": 0.2, "crop_scale": (0.5, 1.0)}
    plain, swapping = image_transform(24, **options), image_transform(24, **options, caption_flip=True)
    still = image_transform(24, **{**options, "flip": 0.0}, caption_flip=True)
    texts = set()
    for seed in range(12):
        pixels, found = swapping.pair(image, text, random.Random(seed))
        texts.add(found)
        assert pixels.equal(swapping(image, random.Random(seed)))
        assert pixels.equal(plain(image, random.Random(seed)))
        flipped = not pixels.equal(still(image, random.Random(seed)))
        assert found == (mirrored if flipped else text)
        assert plain.pair(image, text, random.Random(seed))[1] == text
    assert texts == {text, mirrored}
    assert swapping.for_inference().pair(image, text)[1] == text
    views, found = ImageViews((swapping, plain)).pair(image, text, random.Random(0))
    assert found == swapping.pair(image, text, random.Random(0))[1]
    assert views[0].equal(views[1])


def test_sources_flip_their_captions(tmp_path):
    """CSV and emoji3 as scenes; tars decode as CSV does."""
    from vlmkernels.data import CsvPairs

    picture((20, 20)).save(tmp_path / "a.png")
    (tmp_path / "pairs.csv").write_text("filepath,title\na.png,a cat left of a dog\n")
    always = image_transform(16, train=True, flip=1.0, caption_flip=True)
    assert CsvPairs(tmp_path / "pairs.csv", transform=always)[0]["text"] == "a cat right of a dog"
    emoji = load_emoji3("style-train", transform=always)
    names = [name for name in emoji.names if "left" in name.split()]
    assert names
    index = emoji.names.index(names[0])
    assert emoji[index]["text"] == names[0].replace("left", "right")
