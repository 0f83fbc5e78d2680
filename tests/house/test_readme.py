"""What the README shows, run: its Python, its experiment, its commands, its tree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.commands import maml
from tests.places import ROOT
from tests.readme import SHORT, SHORT_SEARCH, blocks, commands

pytestmark = pytest.mark.long


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    output = None
    if ">" in arguments:
        arguments, output = arguments[:-2], folder / arguments[-1]
    done = maml(*arguments, cwd=folder)
    assert done.returncode == 0, f"maml {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    if output is not None:
        output.write_text(done.stdout)
    return done


def test_the_readme_has_commands() -> None:
    assert len(commands()) >= 12


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_command_works_in_order(tmp_path: Path, real_data: Path) -> None:
    """In one folder, top to bottom, as a newcomer would; training cut short."""
    write_example(tmp_path)
    run_dir, search_dir, name, before = "", "", "", ""
    runs: dict[str, str] = {}
    for arguments in commands():
        names = {"RUN_DIR": run_dir, "NAME": name, "OTHER_RUN": before}
        if arguments[0] == "compare":  # only runs on the same tasks can be
            names = {
                "RUN_DIR": runs["omniglot-5w1s"],
                "PRETRAINED_RUN_DIR": runs["omniglot-5w1s-pretrained"],
            }
        arguments = [names.get(a, a) for a in arguments]
        arguments = [a.replace("SEARCH_DIR", search_dir) for a in arguments]
        if arguments[:3] == ["data", "prepare", "omniglot"]:
            arguments += ["--source", str(real_data / "omniglot")]
        if arguments[:3] == ["data", "prepare", "images"]:
            archive = real_data / "grocery" / "grocery_32.zip"
            arguments = [str(archive) if a == "photos.zip" else a for a in arguments]
        if arguments[0] == "ui":
            continue  # serves until it is stopped; tests/test_tracking.py does that
        if arguments[0] == "search" and "--resume" not in arguments:
            arguments += [*SHORT, *SHORT_SEARCH]
        if arguments[0] in ("submit", "jobs"):
            continue  # need a cluster; tests/test_jobs.py has one and runs them
        if arguments[0] == "train" and "--resume" in arguments:
            overrides = [a for a in arguments if "=" in a]
            arguments = [a for a in arguments if "=" not in a]
            arguments += [f"{override.split('=')[0]}=4" for override in overrides]
        elif arguments == ["train", "sinusoid"]:
            arguments = [*arguments, *SHORT]  # the main job, with its actors
        elif arguments[0] == "train":
            arguments = [*arguments, *SHORT, "cluster.workers=0"]
        if arguments[0] == "evaluate":
            arguments = ["4" if a == "600" else a for a in arguments]
        if arguments[0] == "analyze":
            arguments += ["--tasks", "2"]
        done = run(arguments, tmp_path)
        if arguments[0] == "search":
            found = re.search(r"search folder +(\S+)", done.stdout)
            assert found is not None
            search_dir = found.group(1)
        if arguments[0] == "train":
            found = re.search(r"run folder +(\S+)", done.stdout)
            assert found is not None
            before, run_dir, name = Path(run_dir).name, found.group(1), arguments[1]
            runs[name] = run_dir


def write_example(folder: Path) -> None:
    """The files of the sections on own tasks, by the names in their first lines."""
    for block in (*blocks("python"), *blocks("yaml")):
        first = block.splitlines()[0]
        if first[2:] in ("my_lines.py", "lines.yaml", "point_mass.py", "point-mass.yaml"):
            (folder / first.removeprefix("# ")).write_text(block)


def test_own_tasks_learn(tmp_path: Path) -> None:
    """The worked example, trained as it stands: adapting to a line pays."""
    write_example(tmp_path)
    here = ["cluster.workers=0", "compute.compile=never", "compute.threads=1"]
    done = run(["train", "lines.yaml", *here, "evaluation.tasks=100"], tmp_path)
    row = next(line for line in done.stdout.splitlines() if line.strip().startswith("trained"))
    losses = [float(text) for text in re.findall(r"(\d+\.\d+) ±", row)]
    assert losses[1] < 0.5 * losses[0]


def test_the_library_example_runs() -> None:
    (code,) = (block for block in blocks("python") if "chunk_function" in block)
    assert 12 <= len([line for line in code.splitlines() if line.strip()]) <= 24
    torch.manual_seed(0)
    state: dict[str, object] = {}
    exec(code, state)
    metrics = state["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["query_loss"].mean() < metrics["support_loss"].mean()


def test_the_tree_names_every_file() -> None:
    (tree,) = (block for block in blocks("text") if "tasks/" in block and "pipeline/" in block)
    for folder in ("tasks", "pipeline"):
        for path in (ROOT / folder).rglob("[!_]*.py"):
            assert path.name in tree, path.name
    for name in re.findall(r"\b[a-z_]+\.py\b", tree):
        assert any(list((ROOT / folder).rglob(name)) for folder in ("tasks", "pipeline")), name
