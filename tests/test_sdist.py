"""The source distribution, installed as the README says into an environment with nothing but torch."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from vlmkernels import _native

ROOT = Path(__file__).parents[1]
CODE = """
import torch, vlmkernels
x, y, gate = torch.randn(3, 5), torch.randn(3, 5), torch.randn(1)
torch.testing.assert_close(vlmkernels.gated_residual(x, y, gate), x + gate.tanh() * y)
print(vlmkernels.__file__)
print(vlmkernels.info()["ops"]["gated_residual"]["CPU"])
"""


@pytest.mark.slow
@pytest.mark.skipif(_native.extension is None, reason=f"no C++ extension: {_native.why_not}")
def test_an_op_runs_on_the_kernels_of_an_installed_sdist(tmp_path):
    foreign = ("PYTHON", "VLMKERNELS_", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment["PATH"] = os.pathsep.join([str(tmp_path / "venv" / "bin"), environment["PATH"]])

    def run(*command: object, cwd: Path) -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    sdist = ["egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    run(sys.executable, "setup.py", *sdist, cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    run(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    run("pip", "install", f"torch=={version('torch')}", cwd=tmp_path)

    source = tmp_path / archive.name.removesuffix(".tar.gz")
    readme = (source / "README.md").read_text()
    install = re.search(r"^## Install$.*?^```\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)[1]
    run("bash", "-ec", install, cwd=source)
    file, kernel = run("python", "-c", CODE, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert kernel.startswith("C++ (")
