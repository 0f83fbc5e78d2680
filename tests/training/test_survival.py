"""A run that is killed, fails, or cannot write: what is kept, and how it goes on."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.experiment import Experiment
from pipeline.config.loading import ConfigError
from pipeline.runs.checkpoint import CheckpointError, CheckpointStore
from pipeline.runs.claims import LEASE
from pipeline.runs.continuing import has_checkpoints_elsewhere, run_to_continue
from pipeline.runs.folder import RunFolderError
from pipeline.training.loop import MetaLearning, meta_train
from pipeline.training.opening import open_session
from pipeline.training.outer_optimizer import OuterOptimizer
from pipeline.training.session import Watcher
from tests.conftest import experiment_of
from tests.helpers import Recorder, final_theta


def newest(run_dir: Path) -> int:
    state = CheckpointStore(run_dir / "checkpoints", keep=2).latest()
    assert state is not None
    return state.iteration


def records(run_dir: Path) -> list[dict[str, float]]:
    """What metrics.jsonl has, without the times that things took."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    times = ("seconds", "tasks_per_second")
    return [{k: v for k, v in line.items() if not k.startswith(times)} for line in lines]


def trained(
    experiment: Experiment, run_dir: Path, *, resume: bool = False, watcher: Watcher | None = None
) -> None:
    """Meta-train without a meta-test."""
    method = MetaLearning()
    with open_session(experiment, run_dir, method, resume, watcher or Recorder()) as session:
        meta_train(session)


def killed_at_once(experiment: Experiment, run_dir: Path) -> None:
    """What a run leaves that was killed while its workers started."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(experiment.to_yaml())
    (run_dir / "checkpoints").mkdir()


# -- Killed before the first checkpoint


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    resume: bool, quick: dict[str, Any], tmp_path: Path
) -> None:
    killed_at_once(experiment_of(quick), tmp_path / "run")
    trained(experiment_of(quick), tmp_path / "run", resume=resume)
    assert newest(tmp_path / "run") == 6


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    """It would overwrite what the folder has."""
    trained(experiment_of(quick), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(RunFolderError, match="holds no checkpoint to resume from"):
        trained(experiment_of(quick), tmp_path / "run", resume=True)
    with pytest.raises(RunFolderError, match="already holds a run"):
        trained(experiment_of(quick), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_checkpoints_elsewhere_are_those_of_a_run(quick: dict[str, Any], tmp_path: Path) -> None:
    """A new run in the folder, with checkpoints in another place, would not see them."""
    elsewhere = experiment_of(quick, checkpoint={"uri": (tmp_path / "bucket").as_uri()})
    trained(elsewhere, tmp_path / "run")
    for name in ("metrics.jsonl", "theta.safetensors"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(RunFolderError, match="already holds a run"):
        trained(experiment_of(quick), tmp_path / "run")


def test_only_what_was_a_run_is_continued(quick: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no checkpoint to resume from"):
        trained(experiment_of(quick), tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_a_refused_resume_changes_nothing(quick: dict[str, Any], tmp_path: Path) -> None:
    """Ray has no such worker, which is known late; and the last checkpoint is damaged."""
    run = tmp_path / "run"
    trained(experiment_of(quick, checkpoint={"every": 2, "keep": 3}), run)
    [tensors] = (run / "checkpoints").glob("iteration-00000006-*.safetensors")
    tensors.write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    impossible = {"workers": 1, "cpus_per_worker": 0, "resources_per_worker": {"unicorns": 1.0}}
    with pytest.raises(ValueError, match="unicorns"):
        trained(experiment_of(quick, cluster=impossible), run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# -- Anything that raises


class Failing(RuntimeError):
    """On purpose."""


def fails_at(iteration: int) -> Recorder:
    def at(reached: int, recorder: Recorder) -> None:
        if reached == iteration:
            raise Failing

    return Recorder(at)


def test_what_was_computed_before_an_error_is_kept(quick: dict[str, Any], tmp_path: Path) -> None:
    """Continued, it is the run that it would have been: θ, and the records, also where these are
    means over iterations before and after the error."""
    settings = {**quick, "checkpoint": {"every": 100}, "tracking": {"enabled": False, "every": 4}}
    settings["outer"] = {**quick["outer"], "iterations": 9}
    settings["evaluation"] = {**quick["evaluation"], "every": 5}
    experiment = experiment_of(settings)
    trained(experiment, tmp_path / "whole")
    with pytest.raises(Failing):
        trained(experiment, tmp_path / "cut", watcher=fails_at(6))
    assert newest(tmp_path / "cut") == 6
    trained(experiment, tmp_path / "cut", resume=True)
    assert torch.equal(final_theta(tmp_path / "whole"), final_theta(tmp_path / "cut"))
    assert records(tmp_path / "whole") == records(tmp_path / "cut")


def test_an_interrupted_validation_is_done_when_the_run_goes_on(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    class FailsToValidate(Recorder):
        def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
            if iteration == 4:
                # The workers are lost between the update and its validation.
                self.session.workers.run = None

    experiment = experiment_of(quick, evaluation={"every": 4}, checkpoint={"every": 100})
    trained(experiment, tmp_path / "whole")
    with pytest.raises(TypeError):
        trained(experiment, tmp_path / "cut", watcher=FailsToValidate())
    assert newest(tmp_path / "cut") == 4
    trained(experiment, tmp_path / "cut", resume=True)
    assert records(tmp_path / "whole") == records(tmp_path / "cut")


def test_nothing_is_recorded_twice(quick: dict[str, Any], tmp_path: Path) -> None:
    """What came after the last update was done before the run ended; it is not done again."""
    few = {"every": 3}
    short = experiment_of(quick, diagnostics=few, evaluation=few)
    trained(short, tmp_path / "run")
    before = records(tmp_path / "run")
    trained(short, tmp_path / "run", resume=True)
    assert records(tmp_path / "run") == before
    longer = experiment_of(quick, diagnostics=few, evaluation=few, outer={"iterations": 8})
    trained(longer, tmp_path / "run", resume=True)
    assert records(tmp_path / "run")[: len(before)] == before


def test_half_an_update_is_not_saved(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick = OuterOptimizer.tick

    def interrupted(optimizer: OuterOptimizer) -> None:
        if optimizer.scheduler_state()["steps"] == 3:
            raise KeyboardInterrupt
        tick(optimizer)

    monkeypatch.setattr(OuterOptimizer, "tick", interrupted)
    experiment = experiment_of(quick, checkpoint={"every": 2}, evaluation={"every": 6})
    with pytest.raises(KeyboardInterrupt):
        trained(experiment, tmp_path / "run")
    assert newest(tmp_path / "run") == 2, "θ of iteration 4 is there, its schedule is not"


# -- The clock


def test_checkpoints_are_written_by_the_clock(quick: dict[str, Any], tmp_path: Path) -> None:
    seen = set()

    def look(iteration: int, recorder: Recorder) -> None:
        seen.add(newest(tmp_path / "run"))

    rare = {"every": 100, "minutes": 1e-9}
    experiment = experiment_of(quick, checkpoint=rare, evaluation={"every": 100})
    trained(experiment, tmp_path / "run", watcher=Recorder(look))
    assert seen == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("off", [0, None])
def test_the_clock_can_be_switched_off(off: object, quick: dict[str, Any], tmp_path: Path) -> None:
    seen = set()

    def look(iteration: int, recorder: Recorder) -> None:
        seen.add(newest(tmp_path / "run"))

    rare = {"every": 100, "minutes": off}
    experiment = experiment_of(quick, checkpoint=rare, evaluation={"every": 100})
    trained(experiment, tmp_path / "run", watcher=Recorder(look))
    assert seen == {0}


# -- A store that cannot be written


@dataclass
class Outage:
    """The folder of checkpoints is a file from one iteration on, until another."""

    run_dir: Path
    first: int
    last: int

    def __call__(self, iteration: int, recorder: Recorder) -> None:
        folder, away = self.run_dir / "checkpoints", self.run_dir / "away"
        if iteration == self.first:
            folder.rename(away)
            folder.touch()
        if iteration == self.last:
            folder.unlink()
            away.rename(folder)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write is tried again without a pause."""
    monkeypatch.setattr("pipeline.training.saving._PAUSE", 0.0)
    monkeypatch.setattr("pipeline.training.saving._PAUSE_AT_END", 0.0)


def test_a_failed_write_is_told_and_tried_again_soon(
    quick: dict[str, Any], tmp_path: Path, at_once: None
) -> None:
    run = tmp_path / "run"
    experiment = experiment_of(quick, checkpoint={"every": 2}, evaluation={"every": 100})
    recorder = Recorder(Outage(run, 2, 4))
    trained(experiment, run, watcher=recorder)
    told = [notice for notice in recorder.notices if "cannot be written" in notice]
    assert [notice.partition(":")[0] for notice in told] == ["iteration 2", "iteration 3"]
    assert "Training goes on" in told[0]
    assert [info.iteration for info in CheckpointStore(run / "checkpoints", 9).list()] == [4, 6]


def test_the_next_write_waits_a_little(quick: dict[str, Any], tmp_path: Path) -> None:
    """Three failures are no three in a row of an outage, if they come in a millisecond."""
    recorder = Recorder(Outage(tmp_path / "run", 1, 5))
    experiment = experiment_of(quick, checkpoint={"every": 1})
    trained(experiment, tmp_path / "run", watcher=recorder)
    assert len([notice for notice in recorder.notices if "cannot be written" in notice]) == 1
    assert newest(tmp_path / "run") == 6, "the last one is written at the end"


def test_several_failed_writes_in_a_row_end_the_run(
    quick: dict[str, Any], tmp_path: Path, at_once: None
) -> None:
    recorder = Recorder(Outage(tmp_path / "run", 2, 9))
    experiment = experiment_of(quick, checkpoint={"every": 1}, evaluation={"every": 100})
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        trained(experiment, tmp_path / "run", watcher=recorder)
    assert len(recorder.metrics) == 4
    assert any("iteration 4 is not saved" in note for note in caught.value.__notes__)


def test_the_best_checkpoint_outlives_an_outage(
    quick: dict[str, Any], tmp_path: Path, at_once: None
) -> None:
    """It is written later, as it was: not with the parameters of the later one."""
    settings = {**quick, "evaluation": {**quick["evaluation"], "every": 2}}
    settings["checkpoint"] = {"every": 100, "keep": 9}
    settings["outer"] = {**quick["outer"], "lr": 1e-4}  # every validation is better than the last
    trained(experiment_of(settings), tmp_path / "whole")
    recorder = Recorder(Outage(tmp_path / "run", 2, 3))
    trained(experiment_of(settings), tmp_path / "run", watcher=recorder)
    assert any("cannot be written" in notice for notice in recorder.notices)
    whole, run = (CheckpointStore(tmp_path / name / "checkpoints", 9) for name in ("whole", "run"))
    best = {info.iteration for info in whole.list() if info.best}
    assert 2 in best
    assert {info.iteration for info in run.list() if info.best} == best
    for state in (run._load(iteration) for iteration in best):
        other = whole._load(state.iteration)
        assert all(torch.equal(v, other.tensors[n]) for n, v in state.tensors.items())


# -- One writer


def test_a_run_has_one_writer(quick: dict[str, Any], tmp_path: Path) -> None:
    """In its folder, and where its checkpoints are."""
    experiment = experiment_of(quick, checkpoint={"uri": str(tmp_path / "elsewhere")})
    refused = []

    def second(iteration: int, recorder: Recorder) -> None:
        for resume, folder in itertools.product((False, True), ("run", "other")):
            with pytest.raises(RunFolderError) as caught:
                trained(experiment, tmp_path / folder, resume=resume)
            refused.append(str(caught.value))

    trained(experiment_of(quick), tmp_path / "other")
    trained(experiment, tmp_path / "run", watcher=Recorder(second))
    assert len(refused) == 24
    assert all("is in use by process" in message for message in refused)
    assert {message.partition(":")[0] for message in refused} == {"run_dir", "checkpoint.uri"}
    assert not list(tmp_path.rglob(LEASE))


def test_a_run_that_lost_its_lease_writes_no_more(quick: dict[str, Any], tmp_path: Path) -> None:
    def stolen(iteration: int, recorder: Recorder) -> None:
        if iteration == 3:
            lease = json.loads((tmp_path / "run" / LEASE).read_text())
            (tmp_path / "run" / LEASE).write_text(json.dumps({**lease, "token": "another"}))

    experiment = experiment_of(quick, checkpoint={"every": 1}, evaluation={"every": 100})
    with pytest.raises(RunFolderError, match="was taken over by process"):
        trained(experiment, tmp_path / "run", watcher=Recorder(stolen))
    assert newest(tmp_path / "run") == 2


# -- What `--resume auto` goes on with


def test_the_newest_unfinished_run_of_these_settings_goes_on(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAML_RUNS", str(tmp_path))
    experiment = experiment_of(quick)
    assert run_to_continue(experiment) is None
    for second in range(3):
        killed_at_once(experiment, tmp_path / f"quick-20260101-10000{second}")
    (tmp_path / "quick-20260101-100002" / "results.json").touch()  # it has ended
    assert run_to_continue(experiment) == tmp_path / "quick-20260101-100001"
    longer = experiment_of(quick, outer={"iterations": 12})
    assert run_to_continue(longer) == tmp_path / "quick-20260101-100001"
    assert run_to_continue(experiment_of(quick, inner={"lr": 0.5})) is None
    here = {**quick, "run_dir": str(tmp_path / "quick-20260101-100002")}
    assert run_to_continue(experiment_of(here)) == tmp_path / "quick-20260101-100002"
    with pytest.raises(ConfigError, match=r"the run in .*:\n  inner.lr: was 0.01"):
        run_to_continue(experiment_of(here, inner={"lr": 0.5}))
    assert run_to_continue(experiment_of({**quick, "run_dir": str(tmp_path / "new")})) is None


def test_checkpoints_elsewhere_outlive_their_run_folder(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    """The head and its disk are gone: the same command, in a new folder, goes on."""
    uri = (tmp_path / "bucket").as_uri()
    experiment = experiment_of(quick, checkpoint={"uri": uri, "every": 2})
    assert not has_checkpoints_elsewhere(experiment)
    with pytest.raises(Failing):
        trained(experiment, tmp_path / "first", watcher=fails_at(5))
    shutil.rmtree(tmp_path / "first")
    assert has_checkpoints_elsewhere(experiment)
    with pytest.raises(ConfigError, match=r"the run in file:.*:\n  seed: was 0"):
        has_checkpoints_elsewhere(experiment_of({**quick, "seed": 1}, checkpoint={"uri": uri}))
    recorder = Recorder()
    trained(experiment, tmp_path / "second", resume=True, watcher=recorder)
    assert len(recorder.metrics) == 1
    trained(experiment_of(quick), tmp_path / "whole")
    assert torch.equal(final_theta(tmp_path / "second"), final_theta(tmp_path / "whole"))


# -- Another run's state


def test_another_runs_checkpoints_are_refused(quick: dict[str, Any], tmp_path: Path) -> None:
    """`checkpoint.uri` may change when a run goes on, but not into those of other settings."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    trained(experiment_of(quick), mine)
    trained(experiment_of(quick, inner={"lr": 0.5}), other)
    before = (mine / "metrics.jsonl").read_bytes()
    elsewhere = {"uri": str(other / "checkpoints")}
    with pytest.raises(ConfigError, match=r"inner\.lr: was 0\.5; a resumed run cannot change it"):
        trained(experiment_of(quick, checkpoint=elsewhere), mine, resume=True)
    assert (mine / "metrics.jsonl").read_bytes() == before


def test_no_run_goes_on_to_fewer_iterations(quick: dict[str, Any], tmp_path: Path) -> None:
    """Its last parameters would count as the result of another experiment."""
    trained(experiment_of(quick), tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"outer\.iterations: 3 are fewer than the 6"):
        trained(experiment_of(quick, outer={"iterations": 3}), tmp_path / "run", resume=True)
