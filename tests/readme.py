"""What the README shows: its blocks of code, its commands, and how they are cut short."""

from __future__ import annotations

import re
import shlex

from tests.places import ROOT

README = (ROOT / "README.md").read_text()
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

SHORT_SEARCH = ["search.samples=1", "search.max_concurrent=1"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    """Every `maml` command of the README."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("maml ")]
