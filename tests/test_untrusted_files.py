"""Files of strangers, as docs/security.md has them: none runs code, writes a file or fills the memory."""

import io
import json
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

from tests.test_cli import fail
from vlmkernels.data import BrokenImageError, load_pairs, read_image
from vlmkernels.models import ALIGN, CLIP
from vlmkernels.models.parts.weight_files import read_state_dict
from vlmkernels.train import checkpoint
from vlmkernels.use.embed import read_embeddings


@pytest.fixture
def mark(tmp_path):
    """The file that code in a stranger's file would make; it may not be there at the end."""
    path = tmp_path / "made-by-a-stranger"
    yield path
    assert not path.exists()


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles(mark, tmp_path):
    evil = {"weight": torch.zeros(3), "x": Runs(mark)}
    torch.save(evil, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    mark.unlink()  # it would have run
    for name in ("a.pt", "a.bin", "a.pth", "a.ckpt", "a.safetensors", "pytorch_model.bin", checkpoint.STATE):
        for legacy in (False, True):
            torch.save(evil, tmp_path / name, _use_new_zipfile_serialization=not legacy)
            with pytest.raises(ValueError, match=re.escape(name)):
                read_state_dict(tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    doors = (
        lambda: CLIP.from_openai_state_dict(tmp_path / "a.pt"),
        lambda: CLIP.from_hf_folder(tmp_path),
        lambda: ALIGN.from_hf_state_dict(tmp_path / "a.bin", text_heads=2),
        lambda: checkpoint.load(tmp_path),
    )
    (tmp_path / "a.safetensors").unlink()
    for door in doors:
        with pytest.raises(Exception, match=r"contains io.open|Weights only load failed"):
            door()
    arrays = numpy.array([Runs(mark)], dtype=object)
    numpy.savez(tmp_path / "a.npz", embeddings=arrays, keys=arrays)
    with pytest.raises(ValueError, match="was not written by embed"):
        read_embeddings(tmp_path / "a.npz")


class Writes(nn.Module):
    """Makes a file when torch.jit.load restores it."""

    def __init__(self, path: str):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))
        self.path = path

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(self.weight, self.path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


class Holds(nn.Module):
    """A plain layer, and one that makes a file."""

    def __init__(self, path: str):
        super().__init__()
        self.plain, self.writes = nn.Linear(4, 4), Writes(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.writes(self.plain(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archives(mark, tmp_path):
    model = torch.jit.script(Holds(str(mark)))
    model.save(str(tmp_path / "a.pt"))
    mark.unlink(missing_ok=True)
    torch.jit.load(str(tmp_path / "a.pt"))
    mark.unlink()  # it would have run
    state_dict = read_state_dict(tmp_path / "a.pt")
    assert state_dict.keys() == {"plain.weight", "plain.bias"}
    assert torch.equal(state_dict["plain.weight"], model.plain.weight)


@pytest.mark.parametrize(
    "text",
    [
        'model: !!python/object/apply:builtins.open ["MARK", "w"]',
        '!!python/object/new:builtins.open {args: ["MARK", "w"]}',
        'model_options: !!python/object/apply:os.system ["touch MARK"]',
        "model: !include MARK",
    ],
)
def test_tags_of_yaml(text, mark, tmp_path, capsys):
    text = text.replace("MARK", str(mark))
    config = tmp_path / "a.yaml"
    config.write_text(text)
    code, err = fail(capsys, "train", "clip", "--config", config)
    assert code == 2
    assert re.match(r"Error: config: .*a.yaml is not YAML: could not determine a constructor", err)
    assert len(err.splitlines()) == 1
    code, err = fail(capsys, "train", "clip", "--model-options", text)
    assert code == 2
    assert "model_options must be a mapping" in err


def test_yaml_that_grows(tmp_path, capsys):
    """Ten lists, each ten times the one before: ten thousand million words where they are written out."""
    lines = ["a0: &a0 word", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11))]
    (tmp_path / "a.yaml").write_text("\n".join([*lines, "model: *a10"]))
    code, err = fail(capsys, "train", "clip", "--config", tmp_path / "a.yaml")
    assert code == 2
    assert "unknown keys" in err
    assert len(err) < 10_000


def encoded():
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_tars_with_paths_and_links(tmp_path):
    """Nothing of a tar is written anywhere, and links in it lead nowhere."""
    secret = tmp_path / "secret.txt"
    secret.write_text("not of the tar")
    (tmp_path / "secret.png").write_bytes(encoded())
    inside = tmp_path / "inside"
    inside.mkdir()
    path, absolute = inside / "a.tar", str(tmp_path / "absolute")
    with tarfile.open(path, "w") as tar:

        def add(name, content=b"", kind=tarfile.REGTYPE, link=""):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, link
            tar.addfile(info, io.BytesIO(content))

        for key in ("../above", absolute, "fine"):
            add(f"{key}.png", encoded())
            add(f"{key}.txt", b"a caption")
        add("symbolic.png", encoded())
        add("symbolic.txt", kind=tarfile.SYMTYPE, link=str(secret))
        add("hard.png", kind=tarfile.LNKTYPE, link="../secret.png")
        add("hard.txt", b"a caption")
        add("device.png", encoded())
        add("device.txt", kind=tarfile.CHRTYPE)
        add("pipe.png", kind=tarfile.FIFOTYPE)
        add("pipe.txt", b"a caption")
    before = sorted(Path(tmp_path).rglob("*"))
    source = load_pairs(str(path))
    samples = list(source)
    assert sorted(sample["key"] for sample in samples) == [absolute, "fine"]
    members = {"../above.png", "../above.txt", "device.txt", "hard.png", "pipe.png", "symbolic.txt"}
    assert set(source.skipped) == members | {"device", "hard", "pipe", "symbolic"}
    assert sorted(Path(tmp_path).rglob("*")) == before


def test_pictures_that_grow(tmp_path):
    """179 million pixels are Pillow's limit; the header of this one says a thousand million."""
    png = encoded()
    header = b"IHDR" + struct.pack(">II", 32_000, 32_000) + png[24:29]
    path = tmp_path / "a.png"
    path.write_bytes(png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])
    with pytest.raises(BrokenImageError, match="exceeds limit of 178956970 pixels"):
        read_image(path)


# Each field of a config.json in turn becomes every third of these; what loads all the same changed no size.
HUGE = """
import json
from pathlib import Path
from tests.flamingo_tiny import OURS, flamingo
from tests.simvlm_tiny import tiny_config
from tests.test_models_align import TINY
from tests.test_models_clip import RESNET, VIT
from vlmkernels.models import ALIGN, CLIP, CausalLM, SimVLM

MODELS = [CLIP(VIT), CLIP(RESNET), ALIGN(TINY), CausalLM(OURS), SimVLM(tiny_config()), flamingo()]
VALUES = (10**9, 2**70, -1, 0, 1e300, float("nan"), "x", None, [], [10**9] * 4, {{}}, True)

def folder_of(number):
    return Path({folder!r}) / str(number)

for number, model in enumerate(MODELS):
    model.save_pretrained(folder_of(number))
    type(model).from_pretrained(folder_of(number))

def paths(fields, before=()):
    for name, value in fields.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from paths(value, (*before, name))

def count_refused(cls, folder):
    refused = 0
    whole = json.loads((folder / "config.json").read_text())
    for field, (*parents, name) in enumerate(paths(whole)):
        for value in VALUES[field % 3 :: 3]:
            changed = json.loads(json.dumps(whole))
            part = changed
            for parent in parents:
                part = part[parent]
            part[name] = value
            (folder / "config.json").write_text(json.dumps(changed))
            try:
                cls.from_pretrained(folder)
            except ValueError as error:
                assert str(folder) in str(error), error
                refused += 1
    return refused

def run():
    for number, model in enumerate(MODELS):
        refused = count_refused(type(model), folder_of(number))
        assert refused >= 23, (type(model), refused)
"""


def test_config_values_of_any_size(tmp_path, peak_memory):
    """The weights are a few hundred kB; the configs ask for up to 10^18 parameters."""
    assert peak_memory(HUGE.format(folder=str(tmp_path))) < 64 * 2**20


def test_configs_of_other_libraries_of_any_size(tmp_path):
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "open_clip_pytorch_model.bin")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    for size in (10**9, 2**70, 1e300, "x", None, [], {}, True):
        vision, text = {"width": size, "layers": size}, {"width": size, "vocab_size": size}
        model = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
        with pytest.raises(ValueError, match=str(tmp_path)):
            CLIP.from_open_clip_folder(tmp_path)
        for cls in (CLIP, ALIGN):
            towers = {"hidden_size": size, "num_hidden_layers": size, "width_coefficient": size}
            hf = {"model_type": cls.model_type, "text_config": towers, "vision_config": towers}
            (tmp_path / "config.json").write_text(json.dumps(hf))
            with pytest.raises(ValueError, match=str(tmp_path)):
                cls.from_hf_folder(tmp_path)
