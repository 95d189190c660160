"""`import vlmkernels` survives whatever lies where optional files belong, and info() says so."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

import vlmkernels
from vlmkernels import _calibration, _native, _optional

LINE = "import vlmkernels; print(vlmkernels.info()['cpu']['products of linear layers'])"
needs_extension = pytest.mark.skipif(_native.extension is None, reason="no C++ extension")


def run(code=LINE, *, prefix=(), drop=(), **options):
    """Run a line of Python; an import that hangs is killed and fails."""
    environment = {"VLMKERNELS_CPU_ISA": "", **options.pop("env", {})}
    environment = {k: v for k, v in {**os.environ, **environment}.items() if k not in drop}
    command = [*prefix, sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


def stored(**replaced):
    choice = _calibration.all_products("own")
    return {"machine": _calibration.machine(), "choice": choice, **replaced}


def choices(value):
    choice = _calibration.all_products("own")
    choice["float32"]["forward"] = value
    return json.dumps(stored(choice=choice))


CONTENTS = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00",
    "NUL bytes": bytes(4096),
    "nested too deep": b"[" * 50_000 + b"]" * 50_000,
    "nested objects too deep": b'{"machine":' * 5_000 + b"1" + b"}" * 5_000,
    "a number of many digits": b'{"machine": ' + b"9" * 10_000 + b"}",
    "a list": b"[]",
    "a text": b'"own"',
    "null": b"null",
    "a list for a name": choices(["own"]).encode(),
    "an object for a name": choices({"own": 1}).encode(),
    "a number for a name": choices(1).encode(),
    "null for a name": choices(None).encode(),
    "a list of choices": json.dumps(stored(choice=[])).encode(),
    "a text of choices": json.dumps(stored(choice="own")).encode(),
    "a list of machines": json.dumps(stored(machine=[[["cpu"], 1]])).encode(),
    "no machine": b"{}",
    "no choice": json.dumps({"machine": _calibration.machine()}).encode(),
    "half a choice": json.dumps(stored(choice={"float32": {}})).encode(),
    "a number of machines": json.dumps(stored(machine=3)).encode(),
    "too large": json.dumps(stored(more="x" * _optional.LIMIT)).encode(),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where the calibration would lie, in an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VLMKERNELS_CPU_ISA", raising=False)
    path = _calibration.cache_file()
    path.parent.mkdir()
    return path


def assert_ignored(path):
    """The rule decides, and the reason why the file does not is told."""
    choice, why = _calibration.load()
    by_rule, rule = _calibration.by_rule()
    assert choice == by_rule
    assert why.startswith(f"{rule}; {path} ")


@pytest.mark.parametrize("name", CONTENTS)
def test_a_calibration_of_any_content_is_ignored_with_the_reason(cache, name):
    cache.write_bytes(CONTENTS[name])
    assert_ignored(cache)


def folder(path):
    path.mkdir()


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def endless(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.skipif(os.name == "nt", reason="kinds of files that only POSIX has")
@pytest.mark.parametrize("make", [folder, unix_socket, endless, loop, sparse])
def test_a_calibration_of_any_kind_is_ignored_with_the_reason(cache, make):
    make(cache)
    assert_ignored(cache)


@pytest.mark.skipif(os.name == "nt", reason="there are no FIFOs")
@needs_extension
def test_an_import_does_not_wait_for_the_writer_of_a_fifo(cache):
    os.mkfifo(cache)
    done = run()
    assert done.returncode == 0, done.stderr
    assert f"{cache} cannot be read: it is not a regular file" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "home", ["", "/nowhere", "/dev/null", "relative", "/" + "x" * 300, "/proc/self/mem", "/\udcff"], ids=ascii
)
@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME"])
def test_any_home_will_do(monkeypatch, home, name):
    monkeypatch.delenv("VLMKERNELS_CPU_ISA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(name, home)
    choice, why = _calibration.load()
    assert set(choice) == set(_calibration.DTYPES)
    monkeypatch.setattr(_calibration, "WHY", why)
    str(vlmkernels.info()).encode()


@pytest.mark.skipif(os.name == "nt", reason="there are no permissions to take")
@needs_extension
def test_a_home_that_cannot_be_read(tmp_path):
    prefix = []
    if os.geteuid() == 0:  # who reads everything, unless it gives that right up
        prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
        if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"]).returncode:
            pytest.skip("root cannot give up its rights here")
    private = tmp_path / "home"
    private.mkdir(mode=0)
    done = run(prefix=prefix, env={"HOME": str(private)}, drop=("XDG_CACHE_HOME",))
    assert done.returncode == 0, done.stderr
    assert "Permission denied" in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="users come from a file there is not")
@needs_extension
def test_a_user_without_a_home():
    code = f"import pwd; pwd.getpwuid = {{}}.__getitem__; {LINE}"
    done = run(code, drop=("HOME", "XDG_CACHE_HOME"))
    assert done.returncode == 0, done.stderr
    assert "there is no home folder, and XDG_CACHE_HOME is not set to an absolute path" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"\x7fELF", b"vlmkernels 0.0 for torch 2.0\0", b"vlmkernels \xff for torch \xff\0", bytes(4096)],
)
def test_a_broken_extension_is_one_warning_and_the_reference(tmp_path, monkeypatch, content):
    monkeypatch.delenv("VLMKERNELS_NATIVE", raising=False)
    monkeypatch.delenv("VLMKERNELS_CPU_ISA", raising=False)
    monkeypatch.setattr(_native, "_LIBRARY", tmp_path / _native._LIBRARY.name)
    _native._LIBRARY.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="C\\+\\+ extension .*The reference kernels run instead"):
        extension, reason = _native._load()
    assert extension is None
    assert "the C++ extension" in reason


def test_a_folder_in_place_of_the_extension_is_none(tmp_path, monkeypatch):
    monkeypatch.delenv("VLMKERNELS_NATIVE", raising=False)
    monkeypatch.setattr(_native, "_LIBRARY", tmp_path)
    assert _native._load() == (None, _native._NOT_BUILT)


@pytest.mark.parametrize(
    "text", ["raise RuntimeError('no driver')", "jit = 3"], ids=["it raises", "it is another Triton"]
)
def test_a_broken_triton_is_no_triton(tmp_path, text):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(text)
    (tmp_path / "triton" / "language.py").write_text("")
    code = "import vlmkernels; print(vlmkernels.info())"
    done = run(code, env={"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})
    assert done.returncode == 0, done.stderr
    assert "Triton: " in done.stdout
    assert "CUDA tensors run the reference" in done.stdout
    assert " Triton\n" not in done.stdout


def test_a_value_of_native_that_means_nothing_is_named(monkeypatch):
    monkeypatch.setenv("VLMKERNELS_NATIVE", "no")
    with pytest.warns(RuntimeWarning, match="VLMKERNELS_NATIVE must be 0 or 1, got 'no': ignored"):
        extension, _ = _native._load()
    assert extension is _native.extension


def test_calibrate_says_what_stops_it(monkeypatch):
    monkeypatch.setattr(_calibration, "measure", dict)
    monkeypatch.setattr(_calibration, "CHOICE", _calibration.CHOICE)
    monkeypatch.setattr(_calibration, "WHY", _calibration.WHY)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    with pytest.raises(OSError, match="/dev/null"):
        _calibration.calibrate()
    assert vlmkernels.info()["cpu"]
