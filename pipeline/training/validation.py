"""Looks at validation tasks between iterations: how well they are learned, and whether the
meta-gradient is healthy. Nothing that is trained changes."""

from __future__ import annotations

from pipeline.evaluation.health import diagnosis_jobs, health, warnings_of
from pipeline.evaluation.meta_test import EvaluationSpec, adaptation_curve_of
from pipeline.training.session import Session


def validate(session: Session) -> None:
    """Adapt to the validation tasks; record the curve and the value that ranks checkpoints."""
    experiment = session.experiment
    spec = EvaluationSpec(
        "validation",
        experiment.evaluation.validation_tasks,
        tuple(sorted({*experiment.report_steps, experiment.selection_step})),
    )
    curve = adaptation_curve_of(session.workers, experiment, session.theta, spec)
    chosen = curve.steps.index(experiment.selection_step)
    session.record_validation(curve, curve.mean[session.metric][chosen])


def diagnose(session: Session) -> None:
    """Examine the meta-gradient of some validation tasks; record findings and warnings."""
    jobs = diagnosis_jobs(session.experiment, session.iteration, session.theta.size)
    results = session.workers.run(session.theta, jobs)
    metrics = health(session.experiment, session.optimizer.layout, session.theta, results)
    session.record_diagnosis(metrics, warnings_of(session.experiment, metrics))
