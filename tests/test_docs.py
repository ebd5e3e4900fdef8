"""The pages: links and anchors lead somewhere, commands parse, the tests that they name exist, settings are current."""

import ast
import importlib.util
import re
import shlex
from collections import Counter
from itertools import pairwise
from pathlib import Path

from pipelines.config import SCHEMA, parse_config, settings_page
from pipelines.errors import UserError
from tests.helpers.paths import ROOT

import pytest
from accelerate.commands.launch import launch_command_parser

PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "slurm/*.md") for path in ROOT.glob(pattern) if path.is_file())
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_OURS = {"cd", "curl", "git", "mypy", "pip", "pre-commit", "ruff", "source", "touch", "wandb"}
ENDS_A_COMMAND = {"&&", "||", "|", ";", ">", ">>"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    return BLOCK.sub("", text_of(page))


# Links


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        anchors.add(f"{anchor}-{found[anchor]}" if found[anchor] else anchor)
        found[anchor] += 1
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{target}: no such file"
        assert other.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors_of(other), f"{target}: no such heading"


def test_every_page_is_in_the_index() -> None:
    index = text_of(ROOT / "docs" / "README.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


# What is derived from the code, and what is bounded


def test_the_page_of_settings_is_current() -> None:
    """To renew it: python -m pipelines.config > docs/settings.md"""
    assert text_of(ROOT / "docs" / "settings.md") == settings_page()


def test_the_readme_is_for_newcomers() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    for file, test in re.findall(r"tests/([\w/]*test_\w+\.py)::(test_\w+)", text_of(page)):
        source = ast.parse(text_of(ROOT / "tests" / file))
        assert test in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    folders = "benchmarks|configs|deploy|docs|pipelines|slurm|tests"
    for file in re.findall(rf"`((?:{folders})/[\w./-]+)[`:]", text_of(page)):
        assert (ROOT / file).exists(), file


def test_the_layers_have_these_modules() -> None:
    _, _, after = text_of(ROOT / "docs" / "design.md").partition("\n## Layers\n")
    table = after.partition("\n## ")[0]
    for path in (ROOT / "pipelines").rglob("*.py"):
        assert path.name == "__init__.py" or f"`{path.stem}`" in table, path.relative_to(ROOT)


def test_every_invariant_names_its_test() -> None:
    _, _, after = text_of(ROOT / "docs" / "design.md").partition("\n## Invariants\n")
    rows = re.findall(r"^\| (?!invariant|---)(.+?) \| (.+) \|$", after.partition("\n## ")[0], re.MULTILINE)
    assert len(rows) > 20
    named = r"`tests/[\w/]*test_\w+\.py::test_\w+`"
    for invariant, held_by in rows:
        assert re.fullmatch(rf"{named}(, {named})*", held_by), invariant


# Commands


def commands_of(page: Path) -> list[list[str]]:
    """The commands of a page's bash blocks, and those in its sentences that begin as one of ours does."""
    lines = [
        line
        for language, block in BLOCK.findall(text_of(page))
        if language == "bash"
        for line in re.sub(r"\\\n", " ", block).splitlines()
    ]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page))]
    lines += [span for span in spans if re.match(r"(python|accelerate launch|pytest|uv run) \S", span)]
    commands: list[list[str]] = []
    for line in lines:
        commands.append([])
        for word in shlex.split(line, comments=True):
            if word in ENDS_A_COMMAND:
                commands.append([])
            else:
                commands[-1].append(word)
    return [command for command in commands if command]


def check(command: list[str]) -> None:
    first, *rest = command
    if first in NOT_OURS or "=" in first:
        return
    if first == "uv":
        if rest[0] == "run":
            check([word for word in rest[1:] if word != "--no-sync"])
    elif first == "accelerate":
        assert rest[0] == "launch"
        given = launch_command_parser().parse_args(rest[1:])
        assert given.config_file is None or (ROOT / given.config_file).is_file()
        check_script(Path(given.training_script), given.training_script_args)
    elif first == "python" and rest[0] == "-m":
        module = ROOT / Path(*rest[1].split("."))
        if module.with_suffix(".py").is_file():
            check_script(module.with_suffix(".py").relative_to(ROOT), rest[2:])
        else:
            assert importlib.util.find_spec(rest[1]), rest[1]
    elif first == "python":
        check_script(Path(rest[0]), rest[1:])
    elif first == "sbatch":
        number, script = next((n, word) for n, word in enumerate(rest) if word.endswith(".sbatch"))
        assert (ROOT / script).is_file()
        given = [word for word in rest[number + 1 :] if word != "sweep.txt"]
        check_script(Path("train.py"), given)
    elif first == "pytest":
        _, _, after = text_of(ROOT / "pyproject.toml").partition("\nmarkers = [\n")
        markers = set(re.findall(r'^ +"(\w+): ', after.partition("\n]")[0], re.MULTILINE))
        for option, value in pairwise(rest):
            assert option != "-m" or set(re.findall(r"\w+", value)) - {"not", "and", "or"} <= markers, value
        assert all((ROOT / word).is_file() for word in rest if word.endswith(".py"))
    else:
        script = rest[0] if first == "bash" else first
        assert (ROOT / script).is_file(), script


def check_script(script: Path, arguments: list[str]) -> None:
    """That the script is here and has the flags that it is given; of train.py the values count, too."""
    source = text_of(ROOT / script)
    if script.name == "train.py":
        if "--help" not in arguments:
            parse_config(arguments)
        return
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    texts = {node.value for call in named for node in ast.walk(call) if isinstance(node, ast.Constant)}
    flags = {text for text in texts if isinstance(text, str) and text.startswith("--")} | {"--help"}
    flags |= {"--test-flips"} if "add_test_flips()" in source else set()
    flags |= {"--unsure-for"} if "add_unsure_for()" in source else set()
    flags |= {"--config", *(f"--{key}" for key in SCHEMA)} if "parse_known_args" in source else set()
    for argument in arguments:
        is_flag = argument.startswith("--") and " " not in argument  # else those of another script, in quotes
        assert not is_flag or argument.partition("=")[0] in flags, f"{script} has no {argument}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands_of(page):
        try:
            check(command)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{shlex.join(command)}: {error!r}")


def test_a_command_that_does_not_parse_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for wrong in (
        "accelerate launch train.py --epoch 3",
        "accelerate launch --multi_gpus train.py",
        "accelerate launch train.py --config configs/none.yaml",
        "python deploy/predict.py runs/NAME --tsv x",
        "python benchmarks/none.py",
        "uv run pytest -m none",
        "bash docs/none.sh",
    ):
        with pytest.raises((AssertionError, OSError, UserError, SystemExit)):
            check(shlex.split(wrong))
