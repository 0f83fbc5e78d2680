"""Completes the MLflow runs of a search's trials.

A trial writes its own MLflow run. But a trial that Ray Tune kills cannot end its run, and one that
failed to start has none. So the search makes sure that every trial has a run, and sets how it
ended. A thread does this, so that the search waits for MLflow only at its end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.runs.mlflow_sender import TOKEN
from pipeline.search.trial import COMPLETE, FAILED, STOPPED, UNFINISHED, Plan, TrialResult
from tasks.errors import first_line

log = logging.getLogger(__name__)

_STATUS = {COMPLETE: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED", UNFINISHED: "KILLED"}


class TrialRuns:
    """Ends the MLflow runs of trials; does nothing if tracking is off."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._client: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trial-runs")
        self._ended: dict[str, TrialResult] = {}
        self.run_ids: dict[str, str] = {}
        """MLflow's run by trial, as far as known; complete after `close`."""

    def end(self, result: TrialResult) -> None:
        """Set how a trial ended, unless it has not begun or the same outcome was set before."""
        known = self._ended.get(result.trial_id)
        begun = result.outcome != UNFINISHED or self._plan.trial_dir(result.trial_id).exists()
        said = known is not None and known.outcome == result.outcome
        if self._plan.parent_run_id is None or said or not begun:
            return
        self._ended[result.trial_id] = result
        self._thread.submit(self._end, result)

    def close(self) -> None:
        """Set all outcomes once more, and wait; call it when no trial runs any more.

        Once more, because a trial may have written a status of its own since.
        """
        for result in self._ended.values():
            self._thread.submit(self._end, result)
        self._thread.shutdown(wait=True)

    def _end(self, result: TrialResult) -> None:
        """`_set` in the thread; errors are logged."""
        try:
            self._set(result)
        except Exception as error:  # the search goes on without MLflow
            log.warning(
                "the end of trial %s could not be recorded: %s", result.trial_id, first_line(error)
            )

    def _set(self, result: TrialResult) -> None:
        """Write outcome, failure and status where MLflow has other ones."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self._plan.tracking_uri)
        run = self._find_or_create(result)
        self.run_ids[result.trial_id] = run.info.run_id
        tags = {"search.outcome": result.outcome}
        if result.failure:
            tags["search.failure"] = result.failure[:5000]
        for name, value in tags.items():
            if run.data.tags.get(name) != value:
                self._client.set_tag(run.info.run_id, name, value)
        status = _STATUS[result.outcome]
        if run.info.status != status:
            self._client.set_terminated(run.info.run_id, status)

    def _find_or_create(self, result: TrialResult) -> Any:
        """The trial's MLflow run, found by its token."""
        client, plan = self._client, self._plan
        experiment = client.get_experiment_by_name(plan.experiment.tracking.experiment)
        token = plan.trial_token(result.trial_id)
        found = client.search_runs([experiment.experiment_id], f"tags.`{TOKEN}` = '{token}'")
        if found:
            return found[0]
        tags: Mapping[str, str] = {
            TOKEN: token,
            "mlflow.parentRunId": str(plan.parent_run_id),
            "search": plan.folder.name,
            "search.trial": result.trial_id,
        }
        run = client.create_run(experiment.experiment_id, tags=tags, run_name=result.trial_id)
        for path, value in result.settings.items():
            client.log_param(run.info.run_id, path, value)
        return run
