"""Which code a run ran: commits of the project and of the user's own repository, as tags.

A job's working directory has no repository: `maml submit` asks git on the machine of the user, and
passes the answer on in an environment variable.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

SOURCE = "MAML_SOURCE"
"""Environment variable of a job: the tags of where it was submitted, as JSON."""
PACKAGE = "job.package"
"""Tag of a job's run: the SHA-256 of the files that travelled with it."""
_COMMIT, _DIRTY = "mlflow.source.git.commit", "git.dirty"


def source_tags() -> dict[str, str]:
    """The commit of the project and whether tracked files differ from it; the same, as own.*, of
    another repository that the current folder is in. Of a job: of where it was submitted."""
    if given := os.environ.get(SOURCE):
        return {str(name): str(value) for name, value in json.loads(given).items()}
    project, here = _repository(Path(__file__).parent), _repository(Path.cwd())
    tags = _tags(project, _COMMIT, _DIRTY)
    return {**tags, **_tags(here, "own.git.commit", "own.git.dirty")} if here != project else tags


def _repository(folder: Path) -> str:
    """The top folder of the repository that a folder is in, or ''."""
    return output_of("git", "-C", str(folder), "rev-parse", "--show-toplevel")


def _tags(repository: str, commit: str, dirty: str) -> dict[str, str]:
    """The tags of a repository by their names; none where there is no commit."""
    git = ("git", "-C", repository)
    if not repository or not (found := output_of(*git, "rev-parse", "--verify", "-q", "HEAD")):
        return {}
    changes = output_of(*git, "status", "--porcelain", "--untracked-files=no")
    return {commit: found, dirty: str(bool(changes)).lower()}


def output_of(*command: str) -> str:
    """The output of a command; '' if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
