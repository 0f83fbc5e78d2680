"""cluster.yaml and the manifests of the READMEs, as far as they can be checked without a cloud."""

from __future__ import annotations

import copy
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.resource_demand_scheduler import (
    _default_utilization_scorer,
    get_nodes_for,
)
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.cluster.submission import JOB_RUNS
from pipeline.config.loading import apply_overrides, load
from tests.commands import maml
from tests.places import ROOT
from tests.readme import blocks

TEXT = (ROOT / "cluster.yaml").read_text()


def raw() -> dict[str, Any]:
    config = yaml.safe_load(TEXT)
    assert isinstance(config, dict)
    return config


def prepared() -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(raw())
    validate_config(config)
    return config


def test_ray_accepts_it() -> None:
    prepared()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("idle_minutes",), 3, "'idle_minutes' was unexpected"),
        (("head_node_type",), "nobody", "`head_node_type` must be one of"),
        (("available_node_types", "head", "max_worker"), 0, "'max_worker' was unexpected"),
        (("docker", "head_image"), 5, "5 is not of type 'string'"),
    ],
)
def test_ray_would_refuse_a_mistake(path: tuple[str, ...], value: Any, message: str) -> None:
    """The check above can fail."""
    config = copy.deepcopy(raw())
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(Exception, match=message):
        validate_config(prepare_config(config))


def test_images_are_pinned_to_this_ray() -> None:
    images = [raw()["docker"][f"{role}_image"] for role in ("head", "worker")]
    versions = {re.fullmatch(r"rayproject/ray:([\d.]+)-py\d+-(cpu|gpu)", each) for each in images}
    assert None not in versions
    assert {each[1] for each in versions if each} == {ray.__version__}
    assert {each[2] for each in versions if each} == {"cpu", "gpu"}
    assert f'ray[default,tune,train]=={ray.__version__}"' in raw()["setup_commands"][0]


def test_the_head_computes_nothing_and_idle_workers_go() -> None:
    config = prepared()
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    workers = {k: v for k, v in config["available_node_types"].items() if v is not head}
    assert all(each["min_workers"] == 0 for each in workers.values())
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert config["provider"]["cache_stopped_nodes"] is False


def test_spot_workers_come_first_then_on_demand() -> None:
    """Ray's own choice between the node types, for the actors of a job."""
    types = copy.deepcopy(prepared()["available_node_types"])
    for name in ("gpu_spot", "gpu_on_demand"):
        types[name]["resources"] = {"CPU": 4, "GPU": 1}  # as AWS describes the instance
    market = {n: t["node_config"].get("InstanceMarketOptions") for n, t in types.items()}
    assert market["gpu_spot"] == {"MarketType": "spot"}
    assert market["gpu_on_demand"] is None
    scorer = partial(_default_utilization_scorer, node_availability_summary=None)
    spot, on_demand = (types[n]["max_workers"] for n in ("gpu_spot", "gpu_on_demand"))
    for actors, expected in (
        (1, {"gpu_spot": 1}),
        (spot + on_demand, {"gpu_spot": spot, "gpu_on_demand": on_demand}),
    ):
        chosen, _ = get_nodes_for(types, {}, "head", 100, [{"GPU": 1, "CPU": 1}] * actors, scorer)
        assert dict(chosen) == expected
    types["gpu_spot"]["max_workers"] = 0
    chosen, _ = get_nodes_for(types, {}, "head", 100, [{"GPU": 1, "CPU": 1}], scorer)
    assert dict(chosen) == {"gpu_on_demand": 1}


def test_nothing_is_open_to_the_world() -> None:
    """Without groups of its own a node gets one from Ray, with SSH open to everywhere."""
    config = prepared()
    for node_type in config["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"] == ["sg-00000000000000000"]
    assert "0.0.0.0" not in TEXT
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (path,) = (o.split("=", 1)[1] for o in options if o.startswith("--env RAY_AUTH_TOKEN_PATH="))
    assert config["file_mounts"][path] == "~/.ray/auth_token"
    assert f"--env MAML_RUNS={JOB_RUNS.replace('~', '/home/ray')}" in options


def header() -> list[str]:
    """The commands of the header, without prompts and comments."""
    lines = re.match(r"(?:#.*\n)+", TEXT)
    assert lines is not None
    indented = [line[4:] for line in lines[0].splitlines() if line.startswith("#   ")]
    parts = [p for line in indented for p in re.split(r" && | &(?= )", re.sub(r"\s# .*", "", line))]
    return [part.strip() for part in parts if part.strip() and not part.startswith("# ")]


def test_the_header_goes_from_up_to_down(tmp_path: Path) -> None:
    found = [shlex.split(command)[:2] for command in header()]
    order = [["ray", "up"], ["maml", "submit"], ["ray", "exec"], ["ray", "down"]]
    assert [each for each in found if each in order] == order
    used = [shlex.split(command) for command in header() if command.startswith("maml ")]
    used += [["maml", "ui"]]
    assert any("'maml ui'" in command for command in header())
    for _, command, *arguments in used:
        shown = maml(command, "--help", cwd=tmp_path, COLUMNS="200")
        assert shown.returncode == 0, command
        for option in (each for each in arguments if each.startswith("--") and each != "--"):
            assert option in shown.stdout
    (job,) = (each[each.index("--") + 1 :] for each in used if "submit" in each)
    assert job[0] == "train"
    experiment = load(job[1], job[2:])
    assert experiment.cluster.gpus_per_worker == 1
    chunks = experiment.outer.tasks_per_batch / (experiment.outer.tasks_per_chunk or 1)
    assert chunks == experiment.cluster.workers, "a chunk for every worker"


def manifest(marker: str) -> dict[str, Any]:
    (found,) = (block for block in blocks("yaml") if marker in block)
    parsed = yaml.safe_load(found)
    assert isinstance(parsed, dict)
    return parsed


def test_the_on_premise_variant_is_accepted() -> None:
    changes = manifest("type: local")
    config = prepare_config({**changes})
    validate_config(config)
    assert config["provider"]["worker_ips"]
    assert "RAY_AUTH_MODE=token" in " ".join(config["head_start_ray_commands"])
    assert "RAY_AUTH_MODE=token" in " ".join(config["worker_start_ray_commands"])
    assert "--num-cpus=0" in " ".join(config["head_start_ray_commands"])


def test_the_rayjob_is_what_kuberay_expects() -> None:
    """Fields of the ray.io/v1 custom resources, by KubeRay's API reference."""
    job = manifest("kind: RayJob")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert set(spec) <= {
        "entrypoint", "runtimeEnvYAML", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
        "backoffLimit", "rayClusterSpec", "submissionMode", "metadata", "activeDeadlineSeconds",
    }  # fmt: skip
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions",
        "headGroupSpec", "workerGroupSpecs",
    }  # fmt: skip
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) <= {"rayStartParams", "template"}
    assert head["rayStartParams"]["num-cpus"] == "0", "parameters are strings"
    assert set(workers) <= {
        "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template",
    }  # fmt: skip
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name", "image", "resources"} <= set(container)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert {"MLFLOW_TRACKING_URI", "MAML_DATA_ROOT"} <= set(environment)
    module, *arguments = shlex.split(spec["entrypoint"].removeprefix("python -m "))
    assert module == "pipeline.cli"
    assert arguments[-2:] == ["--resume", "auto"], "KubeRay starts it again when it fails"
    arguments = arguments[:-2]
    assert arguments[0] == "train"
    settings = {"name": "x", "task": {}, "model": {}, "outer": {}}
    changed = apply_overrides(settings, arguments[2:])
    assert changed["cluster"]["workers"] == workers["maxReplicas"]
    assert changed["cluster"]["gpus_per_worker"] == gpus
    load(arguments[1], arguments[2:])
