"""What `make train` sets up first."""

import shutil
import subprocess
import sys

from lmlib.files import PROJECT_ROOT


def test_a_half_made_environment_is_made_again(tmp_path):
    """As Ctrl-C leaves it one second after `make train`: a Python without pip."""
    shutil.copy(PROJECT_ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    python = tmp_path / ".venv" / "bin" / "python"
    has_pip = [python, "-m", "pip", "--version"]
    assert subprocess.run(has_pip, capture_output=True).returncode != 0
    # PIP: installing the packages would need the network.
    make = ["make", ".venv/ready", f"PYTHON={sys.executable}", "PIP=true"]
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run(has_pip, capture_output=True).returncode == 0
    assert (tmp_path / ".venv" / "ready").exists()
