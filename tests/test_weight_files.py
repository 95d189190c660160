"""State dicts from files: wrappers' prefixes, containers, several files, TorchScript archives as tensors."""

import json
import pickle
import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.models.peer_models import open_clip_model
from tests.test_models_clip import RESNET, VIT, inputs, needs_open_clip, randomise
from vlmkernels.models.parts.weight_files import CONTAINERS, read_state_dict


class Tower(nn.Module):
    """Parameters, buffers and nesting of every kind that a model here has."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.block = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2).half())
        self.norm = nn.BatchNorm1d(4)
        self.flipped = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("vocab_size", torch.tensor(49408))
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x):
        return self.norm(self.block[1](self.block[0](x))) * self.scale


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def wrapped(tower, wrappers):
    for wrapper in wrappers:
        if wrapper == "compiled":
            tower = torch.compile(tower)
        elif wrapper == "averaged":
            tower = torch.optim.swa_utils.AveragedModel(tower)
        elif wrapper == "parallel":
            tower = nn.DataParallel(tower)
        else:
            holder = nn.Module()
            holder.model = tower
            tower = holder
    return tower


@pytest.mark.parametrize(
    "wrappers",
    [
        ["compiled"],
        ["averaged"],
        ["parallel"],
        ["lightning"],
        ["compiled", "parallel"],
        ["parallel", "compiled"],
        ["compiled", "averaged"],
        ["averaged", "compiled"],
        ["averaged", "parallel"],
        ["parallel", "averaged"],
        ["compiled", "lightning", "parallel"],
        ["parallel", "lightning", "compiled"],
        ["compiled", "averaged", "lightning", "parallel", "compiled"],
    ],
    ids="-".join,
)
def test_prefixes_are_removed_in_any_order(wrappers):
    tower = Tower()
    assert_same(read_state_dict(wrapped(tower, wrappers).state_dict()), tower.state_dict())


def test_a_part_that_is_compiled_or_sharded():
    tower = Tower()
    plain = dict(tower.state_dict())
    tower.block = torch.compile(tower.block)
    assert_same(read_state_dict(tower.state_dict()), plain)
    for part in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        named = {name.replace("block.0.", f"block.{part}.0.{part}."): x for name, x in plain.items()}
        assert_same(read_state_dict({f"{part}.{name}": x for name, x in named.items()}), plain)
    with pytest.raises(ValueError, match="both with and without the prefix of a wrapper"):
        read_state_dict({"a._orig_mod.b": torch.zeros(1), "a.b": torch.zeros(1)})


def test_names_that_are_no_wrappers_stay():
    names = ["module.a", "b"], ["n_averaged"], ["modules.a"], ["a.module.b"], ["module", "model"]
    for keys in names:
        assert list(read_state_dict(dict.fromkeys(keys, torch.zeros(1)))) == keys


@pytest.mark.parametrize("container", CONTAINERS)
def test_checkpoints_are_unwrapped(container, tmp_path):
    tower = Tower()
    state_dict = {f"module.{name}": tensor for name, tensor in tower.state_dict().items()}
    checkpoint = {"epoch": 3, "optimizer": {"state": {}}, container: state_dict}
    torch.save(checkpoint, tmp_path / "a.pt")
    assert_same(read_state_dict(tmp_path / "a.pt"), tower.state_dict())
    assert_same(read_state_dict({"state_dict": checkpoint}), tower.state_dict())


def test_two_state_dicts_are_not_guessed_between():
    with pytest.raises(ValueError, match="contains state_dict and model; pass one of these state dicts"):
        read_state_dict({"model": Tower().state_dict(), "state_dict": Tower().state_dict()})


def test_a_checkpoint_that_contains_itself(tmp_path):
    checkpoint = {}
    checkpoint["model"] = checkpoint
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt must be a state dict"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [{"a": 1}, {0: torch.zeros(1)}, {"a": None}, {"state_dict": {"a": {}}}])
def test_what_is_no_state_dict(content, tmp_path):
    with pytest.raises(ValueError, match="the mapping given must be a state dict"):
        read_state_dict(content)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'a.pt'} must be a state dict")):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of quantized tensors
def test_what_is_no_dense_tensor(tmp_path):
    quantized = torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)
    special = {"sparse": torch.eye(3).to_sparse(), "meta": torch.zeros(3, device="meta"), "small": quantized}
    torch.save({"a": torch.zeros(100), **special}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="dense tensors that are not quantized, got sparse, meta, small"):
        read_state_dict(tmp_path / "a.pt")


def write_shards(folder, **changes):
    """Two files and their index, of which values may be changed."""
    parts = {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.zeros(3)}}
    for name, part in parts.items():
        save_file(part, folder / name)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}, **changes}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def test_several_files(tmp_path):
    index = write_shards(tmp_path)
    for source in (index, tmp_path):
        assert_same(read_state_dict(source), {"x": torch.ones(2), "y": torch.zeros(3)})


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, 'must contain "weight_map"'),
        ({"x": 3}, 'must contain "weight_map"'),
        ({"x": "../a.safetensors"}, "must name files in its own folder, got ../a.safetensors"),
        ({"x": "/etc/passwd"}, "must name files in its own folder, got /etc/passwd"),
        ({"x": ".."}, "must name files in its own folder, got .."),
        ({"x": "c.safetensors"}, "c.safetensors: no such file"),
        ({"x": "a.safetensors", "z": "b.safetensors"}, "its files do not contain z"),
        ({"x": "a.safetensors", "y": "copy.safetensors"}, "several of its files contain x"),
    ],
)
def test_an_index_that_does_not_fit(weight_map, message, tmp_path):
    index = write_shards(tmp_path, weight_map=weight_map)
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_state_dict(index)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_read_as_tensors(tmp_path):
    path = tmp_path / "a.pt"
    torch.jit.script(Tower().eval()).save(str(path))
    assert_same(read_state_dict(path), torch.jit.load(str(path)).state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@needs_open_clip
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_traced_clip_is_read_as_tensors(config, tmp_path):
    """As OpenAI made its archives: traced, in half precision."""
    peer = randomise(open_clip_model(config)).eval()
    peer.output_dict = False
    traced = torch.jit.trace(peer, inputs(config), check_trace=False).half()
    traced.save(str(tmp_path / "a.pt"))
    assert_same(read_state_dict(tmp_path / "a.pt"), traced.state_dict())


def rewrite(path, change):
    """The zip file with other members: `change` maps (name, content) to the same, or to nothing."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for changed in filter(None, (change(*member) for member in members)):
            archive.writestr(*changed)


def replaced(name, content):
    return lambda member, old: (member, content) if member.endswith(name) else (member, old)


ITSELF = b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01h\x00s."  # a dict that is its own value


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, old: None if name.endswith("data/0") else (name, old), "no item named"),
        (lambda name, old: (name, old[:-1] if name.endswith("data/0") else old), "must be divisible by 4"),
        (lambda name, old: (name, b"" if name.endswith("data/1") else old), "out of bounds"),
        (replaced("data.pkl", b"not a pickle"), "not a file of weights"),
        (replaced("data.pkl", b"\x80\x02}(h\x05u."), "KeyError: 5"),
        (replaced("data.pkl", pickle.dumps({1, 2}, 4)), "has the opcode FRAME"),
        (replaced("data.pkl", ITSELF), "the module a is also part of another"),
        (replaced("byteorder", b"big"), "byte order of another machine"),
    ],
)
def test_a_damaged_torchscript_archive(change, message, tmp_path):
    path = tmp_path / "a.pt"
    torch.jit.script(Tower().eval()).save(str(path))
    rewrite(path, change)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_state_dict(path)
    assert message in str(error.value)


def test_state_dicts_that_repeat_their_memory(tmp_path):
    """They would fill more memory than the file has bytes, by a factor without end."""
    row = torch.ones(1000)
    torch.save({"tied": row, "to": row}, tmp_path / "a.pt")
    assert_same(read_state_dict(tmp_path / "a.pt"), {"tied": row, "to": row})
    for state_dict in ({"a": torch.ones(1).expand(10**12)}, {str(i): row for i in range(1000)}):
        torch.save(state_dict, tmp_path / "b.pt")
        with pytest.raises(ValueError, match=r"b.pt: its tensors repeat each other"):
            read_state_dict(tmp_path / "b.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_archives_that_grow_when_they_are_read(tmp_path):
    """A member of 64 MB of zeros takes 64 KB when it is compressed; torch compresses none."""
    for name, save in (
        ("save.pt", lambda path: torch.save({"a": torch.zeros(2**24)}, path)),
        ("jit.pt", lambda path: torch.jit.script(nn.Linear(2**12, 2**12)).save(str(path))),
    ):
        path = tmp_path / name
        save(path)
        with zipfile.ZipFile(path) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in members:
                archive.writestr(*member)
        with pytest.raises(ValueError, match=r"\.pt: .*compress"):
            read_state_dict(path)
