"""read_image: every mode of a file gives the same upright RGB picture, through every door of the package."""

import io
import os
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

from vlmkernels.data import (
    BrokenImageError,
    image_transform,
    load_pairs,
    read_image,
    transforms,
)
from vlmkernels.use.embed import encode_files
from vlmkernels.use.evaluate import ClassFolders

GREY = numpy.array([[0, 60], [128, 255]], numpy.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content):
    return numpy.asarray(read_image(content))


def rgb(rows):
    return numpy.array(rows, numpy.uint8)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray(GREY), "PNG"),
        (Image.fromarray(GREY.astype(numpy.uint16) * 257), "PNG"),
        (Image.fromarray(GREY.astype(numpy.uint16) * 257), "TIFF"),
        (Image.fromarray((GREY.astype(numpy.uint16) * 257).astype(">u2")), "TIFF"),
        (Image.fromarray(GREY.astype(numpy.int32) * 257), "PPM"),
        (Image.fromarray(GREY.astype(numpy.int32) * 257), "TIFF"),
        (Image.fromarray(GREY.astype(numpy.float32) / 255), "TIFF"),
        (Image.fromarray(GREY.astype(numpy.float32)), "TIFF"),
        (Image.fromarray(GREY).convert("LA"), "PNG"),
        (Image.fromarray(GREY).convert("RGB"), "WEBP"),
        (Image.fromarray(GREY).convert("P"), "GIF"),
        (Image.fromarray(GREY).convert("CMYK"), "TIFF"),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else value,
)
def test_grey_of_any_depth(image, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert pixels(encoded(image, kind, **options)).tolist() == numpy.stack([GREY] * 3, axis=-1).tolist()


def test_one_bit():
    picture = Image.fromarray(GREY > 100)
    assert pixels(encoded(picture))[:, :, 0].tolist() == [[0, 0], [255, 255]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[-0.5, 1.0]], r"must be in \[0, 1\], got -0.5 to 1.0"),
        ([[0.0, 300.0]], r"must be in \[0, 255\], got 0.0 to 300.0"),
        ([[float("nan"), 1.0]], "got nan to nan"),
        ([[0, 70000]], r"must be in \[0, 65535\], got 0 to 70000"),
    ],
)
def test_grey_without_a_known_white_is_refused(values, message):
    array = numpy.array(values)
    image = Image.fromarray(array.astype(numpy.int32 if array.dtype.kind == "i" else numpy.float32))
    with pytest.raises(BrokenImageError, match=message):
        read_image(encoded(image, "TIFF"))


def test_what_is_transparent_lies_on_white():
    red = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    red.putpixel((1, 0), (255, 0, 0, 128))
    half = [255, 127, 127]
    assert pixels(encoded(red)).tolist() == [[[255, 255, 255], half]]
    assert pixels(encoded(red, "WEBP", lossless=True, exact=True)).tolist() == [[[255, 255, 255], half]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert pixels(encoded(grey)).tolist() == [[[255, 255, 255]]]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([9, 9, 9, 0, 200, 0])
    palette.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        assert pixels(encoded(palette, kind, transparency=0)).tolist() == [[[255, 255, 255], [0, 200, 0]]]
    deep = Image.fromarray(numpy.array([[7, 65535, 256]], numpy.uint16))  # 7 and 0 have one high byte
    content = encoded(deep).replace(*_transparent_grey(deep, 7))
    assert pixels(content)[0, :, 0].tolist() == [255, 255, 1]


def _transparent_grey(image, value):
    """The end of a PNG's IHDR chunk, without and with a tRNS chunk of 16 bits behind it."""
    start = encoded(image)[:33]
    body = b"tRNS" + struct.pack(">H", value)
    return start, start + struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first(kind):
    frames = [Image.new("RGB", (3, 2), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.n_frames == 3
    assert pixels(content).tolist() == [[[250, 0, 0]] * 3] * 2


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation):
    """The upright picture is 2 x 3 with six different pixels; stored is what the orientation undoes."""
    upright = numpy.arange(6, dtype=numpy.uint8).reshape(3, 2) * 40
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: numpy.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: numpy.rot90(upright, -1),
    }[orientation]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(numpy.ascontiguousarray(stored)).convert("RGB")
    content = encoded(image, kind, exif=exif(orientation), **options)
    assert pixels(content)[:, :, 0].tolist() == upright.tolist()


@pytest.mark.parametrize(
    "damage", [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff", b""]
)
def test_damaged_metadata_costs_no_picture(damage):
    content = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=exif(6))
    start = content.index(b"\xff\xe1")
    length = struct.unpack(">H", content[start + 2 : start + 4])[0]
    segment = b"\xff\xe1" + struct.pack(">H", len(damage) + 2) + damage
    assert read_image(content[:start] + segment + content[start + 2 + length :]).size == (8, 8)


def write_tar(path, entries):
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


class Recorder(nn.Module):
    """An image tower that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def encode_image(self, images, normalize):
        self.images = images
        return images.flatten(1)[:, :2]


def test_every_door_reads_alike(tmp_path):
    """Tables, tars, class folders and embedding see one image of a picture that lies on its side."""
    noise = numpy.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=numpy.uint8)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encoded(Image.fromarray(noise), exif=exif(6)))
    file = tmp_path / "one" / "a.png"
    (tmp_path / "t.csv").write_text(f"filepath,title\n{file},a\n")
    write_tar(tmp_path / "t.tar", [("a.png", file.read_bytes()), ("a.txt", b"a")])
    transform = image_transform(8)
    expected = transform(read_image(file))
    assert read_image(file).size == (12, 20)
    assert not torch.equal(expected, transform(Image.fromarray(noise)))
    assert load_pairs(str(tmp_path / "t.csv"), transform=transform)[0]["image"].equal(expected)
    assert next(iter(load_pairs(str(tmp_path / "t.tar"), transform=transform)))["image"].equal(expected)
    assert transform(ClassFolders(tmp_path)[0]["image"]).equal(expected)
    model = Recorder()
    encode_files(model, transform, [file])
    assert model.images[0].equal(expected)


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(BrokenImageError, match="FileNotFoundError"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(BrokenImageError, match="File name too long"):
        read_image(tmp_path / ("x" * 256))
    with pytest.raises(BrokenImageError, match="null byte"):
        read_image("a\0b.png")
    with pytest.raises(BrokenImageError, match="neither a regular file nor a folder that can be listed"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BrokenImageError, match="neither a regular file"):
        read_image(tmp_path / "pipe.png")
    with pytest.raises(BrokenImageError, match="neither a regular file"):
        read_image("/dev/zero")
    with pytest.raises(BrokenImageError, match="not UTF-8"):
        read_image(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))


def test_no_interpreter_is_started(tmp_path, monkeypatch):
    """Pillow draws EPS with Ghostscript, whatever the file's name."""
    started = tmp_path / "started"
    fake = tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch {started}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    (tmp_path / "a.png").write_bytes(program)
    with pytest.raises(BrokenImageError, match="Ghostscript"):
        read_image(tmp_path / "a.png")
    assert not started.exists()


def png(width, height):
    """A PNG of one bit per pixel, all of them 0, written row by row."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    row = b"\0" * (1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row * 1000) for _ in range(height // 1000)) + packer.compress(
        row * (height % 1000)
    )
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    ends = chunk(b"IHDR", header), chunk(b"IDAT", data + packer.flush()), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(ends)


def test_more_pixels_than_pillow_allows_are_refused():
    with pytest.raises(BrokenImageError, match="DecompressionBombError"):
        read_image(png(20000, 20000))


WAYS = [
    {},
    {"resize_mode": "squash"},
    {"resize_mode": "longest"},
    {"resize_size": 300},
    {"resize_size": [200, 300]},
    {"train": True},
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (1, 2_000_000)])
def test_a_thin_picture_needs_little_memory(tmp_path, size):
    """1 x 60,000 pixels in 198 bytes are 3,000 million when the short side is 224: 12 GB."""
    content = png(*size)
    assert size != (1, 60000) or len(content) < 250
    (tmp_path / "thin.png").write_bytes(content)
    code = """
import resource, sys
from vlmkernels.data import ImageTransform, image_transform, read_image
image = read_image(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for way in eval(sys.argv[2]):
    assert image_transform(224, **way)(image).shape == (3, 224, 224), way
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc tells the memory in use")
    command = [sys.executable, "-c", code, str(tmp_path / "thin.png"), repr(WAYS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def gradient(width, height):
    x, y = numpy.meshgrid(numpy.linspace(0, 255, width), numpy.linspace(0, 255, height))
    return Image.fromarray(numpy.stack([x, y, (x + y) / 2], axis=-1).astype(numpy.uint8))


@pytest.mark.parametrize("size", [(300, 200), (37, 130), (1, 50), (2000, 90), (48, 48)])
@pytest.mark.parametrize("way", WAYS[:5], ids=str)
def test_only_what_is_shown_is_resized_alike(size, way, monkeypatch):
    transform = image_transform(64, (0, 0, 0), (1, 1, 1), **way)
    whole = transform(gradient(*size))
    monkeypatch.setattr(transforms, "_RESIZED_PIXELS", 0)
    part = transform(gradient(*size))
    assert (whole - part).abs().max() * 255 < 2.01  # Pillow rounds to bytes after rows and after columns


def test_long_sides_are_reduced_first(monkeypatch):
    transform = image_transform(16, (0, 0, 0), (1, 1, 1), resize_mode="squash")
    whole = transform(gradient(700, 500))
    monkeypatch.setattr(transforms, "_SIDE", 100)
    assert 0 < (whole - transform(gradient(700, 500))).abs().max() * 255 < 2.01
