"""What the READMEs say of files, links, commands and messages holds; their Python runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from pipeline.cli.main import app
from tests.newcomer import typed, write_examples
from tests.places import ROOT
from tests.readme import README, READMES, blocks, prose

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
of_each_readme = pytest.mark.parametrize(
    "readme", READMES, ids=lambda path: str(path.parent.relative_to(ROOT))
)


def test_all_readmes_are_read() -> None:
    ignored = (*ignored_names(), ".*")
    found = {
        path
        for path in ROOT.rglob("README.md")
        if not any(fnmatch(part, name) for part in path.relative_to(ROOT).parts for name in ignored)
    }
    assert found == set(READMES)


def test_the_first_hour_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 220


# -- Links


@of_each_readme
def test_links_lead_somewhere(readme: Path) -> None:
    links = [link for link in LINK.findall(prose(readme)) if not link.startswith("https://")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (readme.parent / path).resolve() if path else readme
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_readme_is_one_click_away() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(prose(README))}
    assert {readme for readme in READMES if readme != README} <= linked


def anchors(readme: Path) -> list[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(readme), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


# -- Files


def test_the_main_readme_says_what_is_where() -> None:
    (tree,) = (block for block in blocks("text", README) if "pipeline/ " in block)
    assert len(tree.splitlines()) <= 18
    named = {word.strip("/,;:") for word in tree.split()}
    ignored = (*ignored_names(), ".*", README.name)
    top = {path.name for path in ROOT.iterdir()}
    assert {name for name in top if not any(fnmatch(name, each) for each in ignored)} <= named
    assert {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")} <= named


def test_the_tree_names_every_file_and_no_other() -> None:
    (tree,) = blocks("text", ROOT / "pipeline" / "README.md")
    there = {
        str(path.relative_to(ROOT))
        for folder in ("tasks", "pipeline")
        for path in (ROOT / folder).rglob("[!_]*.py")
    }
    shown = list(paths_of(tree))
    assert there - set(shown) == set(), "in no README"
    assert set(shown) - there == set(), "not there"
    assert len(shown) == len(set(shown))


def paths_of(tree: str) -> Iterator[str]:
    """The files of a tree: two spaces of indentation for every folder, then a caption."""
    above: list[str] = []
    for line in tree.splitlines():
        indented, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        above[len(indented) // 2 :] = [name]
        if not name.endswith("/"):
            assert re.search(rf"{re.escape(name)}  +\w", line), f"{line}: no caption"
            yield "".join(above)


def ignored_names() -> list[str]:
    """What .gitignore names."""
    return [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]


# -- What is said in the middle of a sentence


@of_each_readme
def test_commands_in_sentences_exist(readme: Path) -> None:
    """With their options; `maml --debug` is no option of a command, but understood everywhere."""
    for text in re.findall(r"`maml\s([^`]+)`", prose(readme)):
        words = [word for word in text.split() if word not in ("--debug", "...")]
        command: Any = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        # A group may do something by itself, as `maml runs` does; `maml` does not.
        assert command.name != "maml" or all(word.startswith("-") for word in words), text
        options = {option for each in command.params for option in each.opts}
        assert {word for word in words if word.startswith("--")} <= options, text


def test_messages_in_troubleshooting_are_ones_that_are_printed() -> None:
    table = prose(README).partition("## Troubleshooting")[2]
    symptoms = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ")]
    quoted = [text for symptom in symptoms for text in re.findall(r"`([^`]+)`", symptom)]
    messages = [text for text in quoted if " " in text]
    assert len(messages) >= 8
    for message in messages:
        assert any(message in text for text in texts_of_the_code()), message


@cache
def texts_of_the_code() -> list[str]:
    """All strings of pipeline/ and tasks/, adjacent ones joined."""
    trees = [
        ast.parse(path.read_text())
        for folder in ("pipeline", "tasks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node.value for node in nodes if isinstance(node.value, str)]


# -- Python


def test_examples_import_the_package_before_torch() -> None:
    """Or its setting for waiting threads comes too late. `isort: split` has sorters leave it so."""
    both = 0
    for code in blocks("python"):
        imports = [line for line in code.splitlines() if re.match(r"(from|import) ", line)]
        ours = [n for n, line in enumerate(imports) if line.startswith("from pipeline ")]
        theirs = [n for n, line in enumerate(imports) if re.match(r"\w+ (torch|tasks)\b", line)]
        if ours and theirs:
            both += 1
            assert ours[0] < theirs[0], code
            assert imports[ours[0]].endswith("  # isort: split")
    assert both


@pytest.mark.long
def test_own_tasks_learn(tmp_path: Path) -> None:
    """The worked example, trained as it stands: adapting to a line pays."""
    write_examples(tmp_path)
    here = ["cluster.workers=0", "compute.compile=never", "compute.threads=1"]
    done = typed(["train", "lines.yaml", *here, "evaluation.tasks=100"], tmp_path)
    row = next(line for line in done.stdout.splitlines() if line.strip().startswith("trained"))
    losses = [float(text) for text in re.findall(r"(\d+\.\d+) ±", row)]
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.long
def test_the_library_example_runs() -> None:
    (code,) = (block for block in blocks("python") if "chunk_function" in block)
    assert 12 <= len([line for line in code.splitlines() if line.strip()]) <= 24
    torch.manual_seed(0)
    state: dict[str, object] = {}
    exec(code, state)
    metrics = state["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["query_loss"].mean() < metrics["support_loss"].mean()


@pytest.mark.long
def test_whole_runs_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in blocks("python") if "evaluate_run" in block)
    exec(code, {})
    assert (tmp_path / "runs" / "from-python" / "results.json").is_file()
    assert "K=10 (0, 1, 5)" in capsys.readouterr().out
