"""What the READMEs show: their blocks of code, and their commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.places import ROOT

README = ROOT / "README.md"
READMES = [
    README,
    *(
        ROOT / folder / "README.md"
        for folder in (
            "tune_configs",
            "tasks",
            "pipeline",
            "pipeline/cluster",
            "pipeline/evaluation",
            "benchmarks",
        )
    ),
]
"""All of them, in the order in which a newcomer meets them."""


def blocks(language: str, *readmes: Path) -> list[str]:
    """The blocks of code in a language, in these READMEs or in all."""
    texts = [path.read_text() for path in readmes or READMES]
    return [b for text in texts for b in re.findall(rf"```{language}\n(.*?)```", text, re.S)]


def prose(readme: Path) -> str:
    """A README without its blocks of code."""
    return re.sub(r"```.*?```", "", readme.read_text(), flags=re.S)


def commands(*readmes: Path) -> list[list[str]]:
    """The `maml` commands, as lists of arguments, in these READMEs or in all."""
    lines = [
        re.sub(r"(^|\s)#.*", "", line) for b in blocks("bash", *readmes) for line in b.splitlines()
    ]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("maml ")]
