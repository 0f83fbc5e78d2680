"""What `--resume` goes on with where it names no folder.

auto    a run, or a search, of the same settings that is not over
a URI   the run that has its checkpoints there
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.config.experiment import Experiment
from pipeline.config.loading import (
    absolute_path,
    apply_overrides,
    from_dict,
    load_run,
    refuse_changes,
    refuse_names,
)
from pipeline.runs.checkpoint import CheckpointStore
from pipeline.runs.claims import named_folders
from pipeline.runs.folder import RunFolderError
from tasks.errors import ReportedError

AUTO = "auto"
"""The value of `--resume` that asks for it."""


def run_to_continue(experiment: Experiment) -> Path | None:
    """The folder of a run of this experiment that can go on; None if there is none.

    It is `run_dir`, else the newest run of this name and these settings that has not ended; apart
    from settings that may change when a run is continued. Raises ConfigError if the run in
    `run_dir` has others.
    """

    def check(folder: Path) -> None:
        refuse_another(experiment, load_run(folder), f"the run in {folder}")

    return folder_to_continue(
        experiment, "config.yaml", check, lambda folder: (folder / "results.json").exists()
    )


def folder_to_continue(
    experiment: Experiment,
    config: str,
    check: Callable[[Path], None],
    is_over: Callable[[Path], bool],
) -> Path | None:
    """`run_dir`, else the newest folder of this name that is not over; None if there is none.

    It holds the file `config`, and `check` raises ConfigError for one whose settings are others.
    """
    if experiment.run_dir is not None:
        folder = absolute_path(experiment.run_dir)
        if not (folder / config).is_file():
            return None
        check(folder)
        return folder
    for folder in named_folders(experiment):
        with contextlib.suppress(ReportedError):  # others, or what cannot be read
            if (folder / config).is_file() and not is_over(folder):
                check(folder)
                return folder
    return None


def has_checkpoints_elsewhere(experiment: Experiment) -> bool:
    """Whether the folder `checkpoint.uri` holds a run, which goes on from there though its own
    folder is gone.

    Raises ConfigError if that run has other settings, CheckpointError if it cannot be read.
    """
    uri = experiment.checkpoint.uri
    state = None if uri is None else CheckpointStore(uri, experiment.checkpoint.keep).latest()
    if state is None:
        return False
    refuse_another(experiment, from_dict(state.config), f"the run in {uri}")
    return True


def refuse_another(experiment: Experiment, before: Experiment, source: str) -> None:
    """Raise ConfigError where a run of `before`, which `source` says, cannot go on as one of
    `experiment`: they differ in more than may change then."""
    # A checkpoint has the number of threads that was found for `null`; where results are, and how
    # they were searched for, says nothing about them.
    threads = experiment.compute.threads or before.compute.threads
    after = experiment.changed(search=None, run_dir=before.run_dir, compute={"threads": threads})
    refuse_changes(before, after, source)


def experiment_at(uri: str, overrides: Sequence[str]) -> Experiment:
    """The experiment of the run whose checkpoints are at a URI, to be continued in a new folder.

    Its last state says what its own folder would; overrides may change the same settings as with
    that. Raises ConfigError, CheckpointError, and RunFolderError without a checkpoint, or for a
    `run_dir` that holds a run.
    """
    refuse_names(overrides, uri)
    state = CheckpointStore(uri, keep=1).latest()
    if state is None:
        raise RunFolderError(f"{uri} holds no checkpoint to resume from")
    before = from_dict(state.config).changed(run_dir=None, checkpoint={"uri": uri})
    after = from_dict(apply_overrides(before.model_dump(mode="json"), overrides))
    refuse_changes(before, after.changed(run_dir=None), "the overrides")
    folder = None if after.run_dir is None else absolute_path(after.run_dir)
    if folder is not None and (folder / "config.yaml").exists():
        raise RunFolderError(
            f"run_dir: {folder} already holds a run; continue it with --resume {folder}, or choose "
            "another folder"
        )
    return after
