"""`maml runs` and `maml runs compare` as a person reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.training.loop import train
from tests.commands import maml
from tests.conftest import experiment_of
from tests.recorded import record


def lines_on_a_terminal(*arguments: str, cwd: Path, columns: int) -> list[str]:
    """What a command prints on a terminal of this width, without colours."""
    done = maml(*arguments, cwd=cwd, COLUMNS=str(columns), FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
    assert max(map(len, lines)) <= columns
    return lines


def test_names_stay_whole_on_a_terminal(tmp_path: Path) -> None:
    """Also those that the project makes itself, of its longest experiments."""
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    names = (
        "omniglot-5w1s-pretrained-20261125-235011",
        "sinusoid-20261125-231837",
        "own_name_" * 8,
    )
    for name in names:
        values = {"validation/loss_step10": 0.25, "validation/loss_step10_ci95": 0.01}
        params = {"name": name.rpartition("-2026")[0], "inner.steps": 10}
        tags = {"algorithm": "maml++", "order": "annealed"}
        record(tmp_path / "runs" / name, uri, params=params, tags=tags, metrics=values)
    lines = lines_on_a_terminal("runs", cwd=tmp_path, columns=80)
    assert [word for line in lines for word in line.split() if word in names] == [*names[1::-1]]
    (of_it,) = (number for number, line in enumerate(lines) if names[0] in line)
    assert lines[of_it].rstrip().endswith("query loss, 10 steps")
    assert lines[of_it + 1].split()[1:4] == ["finished", "maml++,", "annealed"]
    assert lines[of_it + 1].rstrip().endswith("0.25 ± 0.01")
    cut = [line.split()[0] for line in lines if "own_name_" in line]
    assert "".join(cut).replace("…", "") == names[2]
    assert all(part.endswith("…") for part in cut[:-1])

    lines = lines_on_a_terminal("runs", "compare", *names[:2], cwd=tmp_path, columns=80)
    assert any("validation: query loss, 10" in line for line in lines)
    parts = [part for line in lines[:4] for part in line.split() if part.strip("─")]
    assert {"omniglot-5w1s-pretrained-", "sinusoid-20261125-231837"} <= set(parts)


def test_curves_are_called_as_the_experiment_calls_them(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    """MLflow's names of metrics have no = and no commas: K=5 is recorded as K-5."""
    variants = {"K=5": {"shots": 5, "queries": 5}, "of-7": {"shots": 7, "queries": 5}}
    few = {"steps": [0, 1], "variants": variants, "baselines": ["random-init", "oracle"]}
    tracking = {"enabled": True, "uri": f"sqlite:///{tmp_path}/runs/mlflow.db"}
    experiment = experiment_of(quick, evaluation=few, tracking=tracking)
    for name in ("one", "other"):
        train(experiment, tmp_path / "runs" / name)
    shown = maml("runs", "compare", "one", "other", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    labels = [re.split(r"  +", line.strip())[0] for line in shown.stdout.splitlines()]
    assert [label for label in labels if label.startswith("test")] == [
        f"test, {who}: query loss, {steps}"
        for who in ("K=5", "K=5, random init", "of-7", "of-7, random init")
        for steps in ("0 steps", "1 step")
    ]


def test_metrics_of_other_programs_keep_their_names(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    for name in ("one", "other"):
        record(tmp_path / "runs" / name, uri, metrics={"test/loss": 1.0}, tags={"test_curves": "["})
    shown = maml("runs", "compare", "one", "other", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^ *test/loss +1 +1 *$", shown.stdout, flags=re.M)
