"""Metrics reach Weights & Biases and MLflow as they reach metrics.json, and only if wanted."""

import json
import sys

import pytest

CONFIG = ("--config-file", "tests/tiny_config.py")


def overrides(tmp_path):
    return (
        f"train.output_dir={tmp_path}/out",
        f"shapes.root={tmp_path}/shapes",
        "train.max_iter=3",
    )


def metrics(tmp_path):
    lines = (tmp_path / "out/metrics.json").read_text().splitlines()
    return {row["iteration"]: row for row in map(json.loads, lines)}


def test_mlflow_gets_metrics_config_and_pictures(train_net, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs stage-interactor[mlflow]")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    client.create_experiment("stage_interactor", artifact_location=f"file://{tmp_path}/artifacts")
    service = ("train.mlflow.enabled=true", f"+train.mlflow.params.tracking_uri={uri}",
               "+train.mlflow.params.run_name=tiny")  # fmt: skip
    process = train_net(*CONFIG, *overrides(tmp_path), *service)
    assert process.returncode == 0, process.output
    experiment = client.get_experiment_by_name("stage_interactor")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "tiny" and run.info.status == "FINISHED"
    for name in ("total_loss", "lr"):
        logged = {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}
        expected = {i: row[name] for i, row in metrics(tmp_path).items() if name in row}
        assert logged == pytest.approx(expected) and len(logged) == 3
    assert client.get_metric_history(run.info.run_id, "bbox/AP")[0].step == 2
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"config.yaml", "detections.jpg"}


def test_wandb_gets_metrics_and_pictures(train_net, tmp_path):
    pytest.importorskip("wandb", reason="needs stage-interactor[wandb]")
    service = ("train.wandb.enabled=true", "+train.wandb.params.mode=offline")
    process = train_net(*CONFIG, *overrides(tmp_path), *service)
    assert process.returncode == 0, process.output
    (folder,) = (tmp_path / "out/wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb"))
    assert list(folder.glob("files/media/images/detections_*.jpg"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_is_not_installed_is_told(name, monkeypatch, tmp_path):
    from stage_interactor.config import ConfigError
    from stage_interactor.engine import SERVICES

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"train.{name}.enabled=true needs: pip install {name}"):
        SERVICES[name](str(tmp_path), {})
