"""Builds Ray Tune's scheduler and search algorithm, runs the trials, and has Tune's callbacks."""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.cluster.capacity import lacking
from pipeline.config.experiment import Experiment
from pipeline.config.search import Search
from pipeline.search.space import draws, in_flight, is_random, settings_of, within
from pipeline.search.trial import (
    FAILED,
    STOPPED,
    UNFINISHED,
    Plan,
    TrialResult,
    bundles,
    run_trial,
    sized_as_trial,
    trial_experiment,
)
from pipeline.search.trial_records import TrialRuns
from tasks.errors import first_line

_RESTARTS = 3  # of a trial whose process died
_IDLE = 120.0  # seconds without a running trial until the watcher is told why

ENVIRONMENT = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # state is saved often: a killed search loses little
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow and the run folders have everything
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output cannot be silenced
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches `should_stop`, as in all commands
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
}
"""Environment variables that this process sets before Ray starts."""


class SearchWatcher:
    """Told what happens in a search. Does nothing; the command line and tests override it."""

    def starting(self, experiment: Experiment, folder: Path) -> None:
        """The preparation begins."""

    def started(self, plan: Plan, trials: int) -> None:
        """Ray and MLflow are ready; the search has `trials` in all, finished ones included."""

    def progress(self, results: Sequence[TrialResult], running: int) -> None:
        """Called often, with all results so far; `running` trials run at this moment."""

    def ended(self, result: TrialResult) -> None:
        """A trial is over."""

    def notice(self, message: str) -> None:
        """Something out of the ordinary happened; `message` is for a person."""


def scheduler_of(search: Search, possible: Sequence[Experiment]) -> Any:
    """Ray Tune's scheduler. Raises ValueError if it refuses `search.scheduler_args`."""
    from ray.tune import schedulers

    iterations = max(e.outer.iterations for e in possible)
    every = max(e.validate_every for e in possible)
    # One iteration more than a trial has: it ends by itself, when everything is written.
    asha = {"time_attr": "iteration", "max_t": iterations + 1, "grace_period": 2 * every}
    # Its unit is a validation: HyperBand derives its brackets from the number of decisions.
    hyperband = {"time_attr": "validations", "max_t": -(-iterations // every)}
    space = draws(search.model_copy(update={"algorithm": "random"}))
    mutations = {path: space[path] for path in in_flight(search)}
    mutations = {p: m["grid_search"] if isinstance(m, dict) else m for p, m in mutations.items()}
    pbt = {
        "time_attr": "iteration",
        "perturbation_interval": 2 * every,
        "hyperparam_mutations": mutations,
        "custom_explore_fn": lambda draw: within(search, draw),
    }
    factory, defaults = {
        "asha": (schedulers.ASHAScheduler, {**asha, "reduction_factor": 3}),
        "hyperband": (schedulers.HyperBandScheduler, {**hyperband, "stop_last_trials": False}),
        "median": (
            schedulers.MedianStoppingRule,
            {"time_attr": "iteration", "grace_period": 2 * every},
        ),
        "pbt": (schedulers.PopulationBasedTraining, pbt),
        "none": (schedulers.FIFOScheduler, {}),
    }[search.scheduler]
    try:
        scheduler = factory(**{**defaults, **search.scheduler_args})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"search.scheduler_args: {factory.__name__} refuses them: {error}"
        ) from None
    return scheduler


def algorithm_of(search: Search, seed: int) -> Any:
    """Ray Tune's search algorithm, seeded. Raises ValueError if its package is missing."""
    if search.algorithm == "tpe":
        if importlib.util.find_spec("optuna") is None:
            raise ValueError("search.algorithm: tpe needs Optuna: pip install -e '.[search]'")
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return OptunaSearch(seed=seed % 2**32)
    from ray.tune.search.basic_variant import BasicVariantGenerator

    # Each draw is combined with every point of the grids: trials that differ in these alone.
    return BasicVariantGenerator(
        constant_grid_search=True,
        random_state=seed % 2**32,
        max_concurrent=search.max_concurrent or 0,
    )


def trial_lacks(experiment: Experiment) -> str:
    """Says which resource Ray lacks for a single trial; '' if there is enough."""
    workers = experiment.cluster.workers
    who = f"a trial takes {workers} workers of" if workers else "a trial takes"
    return lacking(who, bundles(experiment))


def run_trials(plan: Plan, scheduler: Any, algorithm: Any, conductor: Any) -> None:
    """Run or continue the trials; return when all are over or the search is stopped.

    Calls `tune.run` rather than its wrapper `Tuner`, which pickles callbacks and scheduler and
    continues a search with the pickled ones.
    """
    from ray import tune

    for chatty in ("ray.tune", "ray.air", "ray.train"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    search = plan.search

    def trial(draw: dict[str, Any]) -> None:
        run_trial(plan, draw)

    def resources(draw: dict[str, Any]) -> Any:
        experiment = sized_as_trial(plan.experiment)
        if any(path.startswith("cluster.") for path in search.space):
            experiment = trial_experiment(plan, "", settings_of(search, draw))
        return tune.PlacementGroupFactory(bundles(experiment))

    begun = any((plan.folder / "tune").glob("experiment_state-*.json"))
    resumed = tune.ResumeConfig.ResumeType.RESUME
    analysis = tune.run(
        tune.with_resources(trial, resources),
        name="tune",
        storage_path=str(plan.folder),
        trial_dirname_creator=lambda trial: trial.trial_id,
        config=draws(search),
        num_samples=search.samples if is_random(search) else 1,
        metric="value",
        mode=plan.ranking.mode,
        scheduler=scheduler,
        search_alg=algorithm,
        time_budget_s=search.time_budget,
        # The other algorithm has its own limit, and warns if there are two.
        max_concurrent_trials=search.max_concurrent if search.algorithm == "tpe" else None,
        checkpoint_config=tune.CheckpointConfig(num_to_keep=3),
        max_failures=_RESTARTS,
        reuse_actors=True,
        raise_on_failed_trial=False,
        resume_config=tune.ResumeConfig(unfinished=resumed, errored=resumed) if begun else None,
        callbacks=[conductor],
        verbose=0,
    )
    conductor.trials = analysis.trials  # Tune calls no callback for a search that was over


def conductor_of(
    plan: Plan, watcher: SearchWatcher, runs: TrialRuns, should_stop: Callable[[], bool]
) -> Any:
    """A callback of Ray Tune that tells watcher and MLflow what happens, and stops when asked to.

    A function, because its class derives from one of Ray's, which is imported only here.
    """
    from ray import tune

    class Conductor(tune.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.trials: list[Any] = []
            self._last_running = time.monotonic()

        def results(self, over: bool = False) -> list[TrialResult]:
            return [result_of(plan, trial, over) for trial in self.trials]

        def setup(
            self, stop: Any = None, num_samples: Any = None, total_num_samples: int = 0, **_: Any
        ) -> None:
            watcher.started(plan, total_num_samples)

        def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
            self.trials = trials
            running = sum(trial.status == "RUNNING" for trial in trials)
            watcher.progress(self.results(), running)
            self._tell_why_none_runs()
            if should_stop():
                _ask_tune_to_stop()

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **_: Any
        ) -> None:
            self._end(result_of(plan, trial, over=True))

        on_trial_error = on_trial_complete

        def _end(self, result: TrialResult) -> None:
            runs.end(result)
            watcher.ended(result)

        def _tell_why_none_runs(self) -> None:
            now = time.monotonic()
            if any(trial.status == "RUNNING" for trial in self.trials):
                self._last_running = now
            elif now - self._last_running > _IDLE:
                self._last_running = now
                short = trial_lacks(sized_as_trial(plan.experiment))
                watcher.notice(short or f"no trial has run for {_IDLE:.0f} s: waiting for room")

    return Conductor()


def _ask_tune_to_stop() -> None:
    """Send the signal on which Tune saves its state and ends; elsewhere raise KeyboardInterrupt."""
    asked = threading.current_thread() is threading.main_thread()
    if not asked or not callable(signal.getsignal(signal.SIGUSR1)):
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGUSR1)


def result_of(plan: Plan, trial: Any, over: bool) -> TrialResult:
    """A trial's result, from Tune; once the search is `over`, an unfinished trial was stopped."""
    result = plan.result(trial.trial_id, trial.config, trial.last_result or {})
    if trial.status == "ERROR":
        error = trial.get_pickled_error()
        reason = first_line(error) if error else "it died"
        return replace(result, outcome=FAILED, failure=result.failure or reason)
    if result.outcome == UNFINISHED and (over or trial.status == "TERMINATED"):
        return replace(result, outcome=STOPPED)
    return result
