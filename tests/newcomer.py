"""Somebody who types the commands of a README, top to bottom, in one folder."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.commands import maml
from tests.readme import blocks, commands

# Enough to see a command work; its own settings come first.
SHORT = [
    "outer.iterations=3",
    "outer.tasks_per_batch=4",
    "outer.tasks_per_chunk=2",
    "evaluation.tasks=4",
    "evaluation.validation_tasks=4",
    "compute.compile=never",
    "compute.threads=1",  # two would wait for each other where tests share the cores
]
_PATHS = ["task.trajectories=4", "task.horizon=6", "reinforcement.cg_iterations=2"]
_FILTERS = ["model.filters=8"]
SMALL = {
    "navigation": _PATHS,
    "cheetah-direction": _PATHS,
    "omniglot-5w1s-short": _FILTERS,
    "image-folder": _FILTERS,
}
"""What makes an iteration of an experiment short, too, and all that is done with its run."""
SHORT_SEARCH = ["search.samples=1", "search.max_concurrent=1"]

# Served until it is stopped (tests/runs/test_mlflow_pages.py), or in need of a cluster
# (tests/cluster/test_jobs.py, which types all commands of this kind).
ELSEWHERE = ("ui", "submit", "jobs")


@dataclass
class Newcomer:
    """Types commands in `folder`, training and tests cut short; `data` is of `tests.drawn_data`."""

    folder: Path
    data: Path
    runs: list[tuple[str, str]] = field(default_factory=list)
    """Experiment and folder of each training, in order."""
    search: str = ""

    def follow(self, readme: Path) -> None:
        """Type every command of a README; each must work."""
        write_examples(self.folder)
        for arguments in commands(readme):
            if arguments[0] not in ELSEWHERE:
                self.type(self.shortened(self.filled_in(arguments)))

    def filled_in(self, arguments: list[str]) -> list[str]:
        """The command with the names that stand for something of one's own replaced."""
        names = {"photos.zip": str(self.data / "photos.zip")}
        pretrained = [run for run in self.runs if run[0].endswith("-pretrained")]
        if pretrained:
            names["PRETRAINED_RUN_DIR"] = pretrained[-1][1]
        if trained := [run for run in self.runs if run not in pretrained]:
            names["RUN_DIR"] = trained[-1][1]
        if others := [run for _, run in self.runs if run != names["RUN_DIR"]]:
            names["OTHER_RUN"] = Path(others[-1]).name
        filled = [names.get(each, each) for each in arguments]
        return [each.replace("SEARCH_DIR", self.search) for each in filled]

    def shortened(self, arguments: list[str]) -> list[str]:
        """The command with little to do, and nothing to download."""
        match arguments:
            case ["data", "prepare", "omniglot", *_]:
                return [*arguments, "--source", str(self.data)]
            case ["search", *rest] if "--resume" not in rest:
                return [*arguments, *SHORT, *SHORT_SEARCH]
            case ["train", *rest] if rest[:1] == ["--resume"]:
                return [re.sub(r"^(outer.iterations)=.*", r"\1=4", each) for each in arguments]
            case ["train", "sinusoid"]:
                return [*arguments, *SHORT]  # the main job, with its actors
            case ["train", name, *_]:
                return [*arguments, *SHORT, *SMALL.get(name, []), "cluster.workers=0"]
            case ["evaluate", *_]:
                few = [] if "--tasks" in arguments else ["--tasks", "2"]
                return [*("4" if each == "600" else each for each in arguments), *few]
            case ["analyze", *_]:
                return [*arguments, "--tasks", "2"]
        return arguments

    def type(self, arguments: list[str]) -> None:
        """Run a command, and keep in mind which folder it names."""
        done = typed(arguments, self.folder)
        if arguments[0] == "train" and arguments[1] != "--resume":
            self.runs.append((arguments[1], _folder("run", done.stdout)))
        if arguments[0] == "search":
            self.search = _folder("search", done.stdout)


def typed(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that must work; `> FILE` at its end is understood."""
    output = None
    if ">" in arguments:
        arguments, output = arguments[:-2], folder / arguments[-1]
    done = maml(*arguments, cwd=folder)
    assert done.returncode == 0, f"maml {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    if output is not None:
        output.write_text(done.stdout)
    return done


def write_examples(folder: Path) -> None:
    """The files of one's own that the READMEs show."""
    for name, text in examples().items():
        (folder / name).write_text(text)


def examples() -> dict[str, str]:
    """These files, by the names in their first lines."""
    shown = (*blocks("python"), *blocks("yaml"))
    named = [(re.match(r"# ([\w-]+\.(py|yaml))\n", block), block) for block in shown]
    return {name[1]: block for name, block in named if name}


def _folder(kind: str, printed: str) -> str:
    found = re.search(rf"{kind} folder +(\S+)", printed)
    assert found is not None, printed
    return found[1]
