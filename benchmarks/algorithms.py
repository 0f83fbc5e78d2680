"""Measures what the algorithms of the family reach, and what an iteration of each costs.

    python benchmarks/algorithms.py train             every run that is not there yet (hours)
    python benchmarks/algorithms.py train 5w1s/maml   some of them; interrupted ones go on
    python benchmarks/algorithms.py table             accuracies of the runs that are there
    python benchmarks/algorithms.py speed             time per iteration, algorithms in turns
    python benchmarks/algorithms.py health            many inner steps: what the diagnostics saw

Every run is `maml train` with a shipped experiment and the overrides below, in its own folder of
`runs/algorithms`; give the image stores with --data. The table says iterations and minutes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from trained import finished, minutes, parse, train

from pipeline.config.loading import ConfigError, load
from pipeline.evaluation.comparison import compare_runs
from pipeline.evaluation.health import PREFIX, by_step
from pipeline.maml.flat_vector import Layout
from pipeline.runs.folder import History
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.learner import initial_parameters

FOLDER = Path("runs/algorithms")
_MANY_STEPS = ("inner.steps=10", "inner.lr=0.05", "diagnostics.every=250")
RUNS: dict[str, tuple[str, ...]] = {
    "5w1s/maml": ("omniglot-5w1s-short",),
    "5w1s/maml++": ("omniglot-5w1s-short", "algorithm=maml++"),
    "5w1s/maml++long": ("omniglot-5w1s-short", "algorithm=maml++", "outer.iterations=16000"),
    "5w1s/anil": ("omniglot-5w1s-short", "algorithm=anil"),
    "5w1s/fomaml": ("omniglot-5w1s-short", "algorithm=fomaml"),
    "5w1s/boil": ("omniglot-5w1s-short", "algorithm=boil"),
    "5w1s/meta-sgd": ("omniglot-5w1s-short", "algorithm=meta-sgd"),
    "5w1s/reptile": ("omniglot-5w1s-reptile",),
    "5w1s/pretrained": ("omniglot-5w1s-pretrained",),
    "20w1s/maml": ("omniglot-20w1s-short",),
    "20w1s/maml++": ("omniglot-20w1s-short", "algorithm=maml++"),
    "sinusoid/maml": ("sinusoid-paper", "inner.lr=0.01", "outer.iterations=20000"),
    "sinusoid/meta-sgd": (
        "sinusoid-paper",
        "algorithm=meta-sgd",
        "inner.lr=0.01",
        "outer.iterations=20000",
    ),
    "steps/maml": ("sinusoid", *_MANY_STEPS),
    "steps/annealed": (
        "sinusoid",
        *_MANY_STEPS,
        "inner.order=annealed",
        "outer.query_losses=annealed",
    ),
}
_SHOWN = ("", "K=10", "1 query", "1 shot, 1 query")  # the variants of test tasks in the table
SPEED: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("maml", "fomaml", "anil", "maml++", "meta-sgd", "boil"),
    ("inner.steps=5", "task.queries=1"): ("maml", "fomaml", "anil"),
    ("inner.steps=10",): ("maml", "anil"),
}
"""The algorithms to time, by the overrides that they have in common."""
_TURNS, _CALLS = 9, 6


def table(names: list[str]) -> list[str]:
    """The metric after the selection step and the last step, and the difference to MAML."""
    lines = [
        "| run | after n steps | trained | random init | minus MAML, same tasks | iterations | "
        "minutes of updates |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, folder, experiment, curves in finished(FOLDER, names):
        shown = [curve for curve in curves if curve["variant"] in _SHOWN]
        metric = "accuracy" if "accuracy" in shown[0]["mean"] else "loss"
        scale, unit = (100, " %") if metric == "accuracy" else (1, "")
        base = FOLDER / name.split("/")[0] / "maml"
        known = shown[0]["steps"]
        for step in sorted({experiment.selection_step, known[-1]} & set(known)):
            cells = {}
            for curve in shown:
                at = known.index(step)
                mean, half = (scale * curve[key][metric][at] for key in ("mean", "ci95"))
                diverged = not math.isfinite(mean)
                cells[curve["who"]] = "diverged" if diverged else f"{mean:.2f} ± {half:.2f}{unit}"
            lines.append(
                f"| {name} | {step} | {cells['trained']} | {cells.get('random init', '')} | "
                f"{against(base, folder, step)} | {experiment.outer.iterations:,} | "
                f"{minutes(folder, experiment.outer.tasks_per_batch):.0f} |"
            )
    return lines


def against(base: Path, folder: Path, step: int) -> str:
    """The paired difference to MAML; '' where the tasks are not the same."""
    if folder == base or not (base / "results.json").exists():
        return ""
    try:
        found = compare_runs([base, folder], steps=(step,))
    except ConfigError:  # the tasks differ
        return ""
    paired = next((c for c in found if c.variant in _SHOWN), found[0])
    scale, unit = (100, " %") if paired.metric == "accuracy" else (1, "")
    (difference,) = paired.differences
    if not math.isfinite(difference.mean[0]):
        return ""
    return (
        f"{scale * difference.mean[0]:+.2f} ± {scale * difference.ci95[0]:.2f}{unit} "
        f"(p = {difference.p[0]:.2g})"
    )


def _growth(record: dict[str, float]) -> float:
    """The norm of the meta-gradient before the first inner step over that after the last."""
    norms = by_step(record, "gradient_norm")
    return float(norms[0] / norms[-1])


def health() -> list[str]:
    """Diagnoses of ten inner steps: of every quarter of the training the one of largest growth."""
    lines = [
        "| run | iteration | norm after the last step | norm before the first | grown | "
        "cosine with first order | adaptation hurts |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("steps/maml", "steps/annealed"):
        records = History(FOLDER / name).records()
        found = [record for record in records if f"{PREFIX}hurt_share" in record]
        size = -(-len(found) // 4)
        for window in (found[i : i + size] for i in range(0, len(found), size)):
            record = max(window, key=_growth)
            norms = by_step(record, "gradient_norm")
            lines.append(
                f"| {name} | {record['iteration']:,} | {norms[-1]:.3g} | {norms[0]:.3g} | "
                f"{_growth(record):.3g}x | {record[f'{PREFIX}order_cosine']:.2f} | "
                f"{100 * record[f'{PREFIX}hurt_share']:.0f} % |"
            )
    return lines


def speed(data: str) -> list[str]:
    """Time compiled meta-gradients of one chunk, algorithms in turns in this process."""
    torch.set_num_threads(1)
    lines = [
        "| settings | algorithm | ms per chunk (median) | MAML / algorithm, in the same turn |",
        "|---|---|---|---|",
    ]
    for settings, algorithms in SPEED.items():
        times = _timed(algorithms, [*settings, f"data.root={data}"])
        for algorithm, values in times.items():
            ratio = statistics.median(m / v for m, v in zip(times["maml"], values, strict=True))
            lines.append(
                f"| {' '.join(settings) or 'as shipped'} | {algorithm} | "
                f"{1e3 * statistics.median(values):.0f} | {ratio:.2f}x |"
            )
    return lines


def _timed(algorithms: tuple[str, ...], overrides: list[str]) -> dict[str, list[float]]:
    """Seconds per chunk of 4 tasks, by turn."""
    calls = {}
    for algorithm in algorithms:
        # The last iteration: there annealed order is second, and only the last query loss counts.
        experiment = load("omniglot-5w1s-short", [f"algorithm={algorithm}", *overrides])
        computer = ChunkComputer(experiment, compile=True)
        theta = initial_parameters(experiment)
        flat = Layout.of(theta).join(theta)
        function, batch, knobs = computer.program(experiment.outer.iterations - 1)
        began = time.perf_counter()
        function(flat, batch, knobs)
        print(f"{algorithm}: first call {time.perf_counter() - began:.0f} s", flush=True)
        calls[algorithm] = lambda f=function, a=(flat, batch, knobs): f(*a)
    times: dict[str, list[float]] = {algorithm: [] for algorithm in calls}
    for _ in range(_TURNS):
        for algorithm, call in calls.items():
            began = time.perf_counter()
            for _ in range(_CALLS):
                call()
            times[algorithm].append((time.perf_counter() - began) / _CALLS)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(Path("data").absolute()), help="of the image stores")
    arguments = parse(parser, ["train", "table", "speed", "health"], RUNS)
    if arguments.what == "train":
        train(RUNS, FOLDER, arguments.names, [f"data.root={arguments.data}"])
        return
    made = {
        "table": lambda: table(arguments.names),
        "speed": lambda: speed(arguments.data),
        "health": health,
    }
    print("\n".join(made[arguments.what]()))


if __name__ == "__main__":
    main()
