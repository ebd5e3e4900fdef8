"""What a run leaves: whole files, a name of its own, and a status that programs can read."""

import json
import re
from pathlib import Path

from pipelines.config import Config, dump_yaml, parse_config
from pipelines.dataset import Dataset, load_dataset, scan_dataset
from pipelines.errors import MachineError, UserError
from pipelines.runs import RunFolder, describe_model, new_run_name, replacing, versions

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch) -> None:
    names = "WANDB_SWEEP_ID WANDB_RUN_ID SLURM_JOB_ID SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_RESTART_COUNT"
    names += " DALITUNE_JOB"
    for name in names.split():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "one")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


# Names


def test_a_name_of_its_own_has_recipe_time_and_four_letters():
    assert re.fullmatch(OWN_NAME, new_run_name("finetune"))
    assert len({new_run_name("finetune") for _ in range(20)}) == 20


OWN_NAME = r"finetune-\d{8}-\d{6}-[a-z]{4}"


def test_the_name_is_the_jobs_for_the_training_alone_that_the_job_script_starts(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")  # as in an allocation, from a notebook, in a loop
    assert re.fullmatch(OWN_NAME, new_run_name("finetune"))
    for job in ("4711", "4700-3"):
        monkeypatch.setenv("DALITUNE_JOB", job)
        assert new_run_name("finetune") == f"finetune-{job}"


def test_under_a_wandb_agent_the_name_is_the_agents_run_until_that_is_finished(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert re.fullmatch(OWN_NAME, new_run_name("finetune"))  # a run id alone is no sweep
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    run = RunFolder(tmp_path / "abc123")
    assert new_run_name("finetune", str(tmp_path)) == "abc123"
    run.create(Config())
    assert new_run_name("finetune", str(tmp_path)) == "abc123"
    run.write_status("finished")
    assert re.fullmatch(OWN_NAME, new_run_name("finetune", str(tmp_path)))
    monkeypatch.setenv("WANDB_RUN_ID", "../a b")
    assert new_run_name("finetune", str(tmp_path)) == "a-b"


@given(st.text(max_size=80))
def test_every_recipe_gives_a_name_that_the_flag_run_takes(recipe):
    name = new_run_name(recipe)
    assert Config(run=name).run == name


# The folder


def test_create_leaves_config_and_status(run):
    config = Config(lr=0.02, run="one")
    run.create(config)
    assert files(run.folder) == ["config.yaml", "figures", "status.json"]
    assert (run.folder / "config.yaml").read_text() == dump_yaml(config)
    assert parse_config([f"--config={run.folder / 'config.yaml'}"])[0] == config
    assert run.status() == {"state": "running", "reason": "", "exit_code": None, "epoch": 0, "global_step": 0}


def test_the_other_processes_write_nothing(tmp_path):
    run = RunFolder(tmp_path / "one", writes=False)
    run.create(Config(overwrite=True))
    run.write_status("finished")
    run.append_metrics({"epoch": 1})
    run.save_best(torch.nn.Linear(1, 1), {})
    assert files(tmp_path) == []
    assert run.status() == {}
    assert run.read_metrics() == []


def test_a_run_is_new_resumed_or_finished(run, monkeypatch):
    assert run.beginning(Config()) == "new"
    run.create(Config(epochs=5))
    for state in ("running", "stopped", "failed"):
        run.write_status(state)
        assert run.beginning(Config(epochs=5)) == "resumed"
        assert run.beginning(Config(epochs=5, overwrite=True)) == "new"
    run.write_status("finished", exit_code=0, epoch=3, global_step=30)
    assert run.status()["global_step"] == 30
    assert run.beginning(Config(epochs=5)) == "finished"
    assert run.beginning(Config(epochs=4)) == "finished"
    assert run.beginning(Config(epochs=6)) == "resumed"
    assert run.beginning(Config(epochs=5, overwrite=True)) == "new"
    # The flags of a job that Slurm starts again are those of its first life.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run.beginning(Config(epochs=6, overwrite=True)) == "resumed"


def test_a_resumed_run_keeps_what_is_in_its_folder(run):
    run.create(Config())
    run.append_metrics({"epoch": 1})
    length = run.metrics_bytes()
    run.append_metrics({"epoch": 2})
    run.write_status("stopped")
    run.close()
    again = RunFolder(run.folder)
    again.create(Config(epochs=7), resumed=True)
    assert again.status()["state"] == "stopped"
    assert "epochs: 7" in (run.folder / "config.yaml").read_text()
    assert len(again.read_metrics()) == 2
    again.cut_metrics(length)
    assert again.read_metrics() == [{"epoch": 1}]
    again.cut_metrics(length + 100)
    assert again.metrics_bytes() == length


def test_a_folder_that_is_no_run_is_in_the_way(run):
    run.folder.mkdir(parents=True)
    (run.folder / "notes.txt").write_text("mine")
    assert run.beginning(Config()) == "new"
    with pytest.raises(UserError, match="is not a run folder"):
        run.create(Config())


def test_overwrite_starts_anew(run):
    run.create(Config())
    run.append_metrics({"epoch": 1})
    run.save_best(torch.nn.Linear(1, 1), {})
    run.create(Config(lr=0.5, overwrite=True))
    assert files(run.folder) == ["config.yaml", "figures", "status.json"]
    assert "lr: 0.5" in (run.folder / "config.yaml").read_text()


def test_overwrite_never_removes_what_is_no_run(run):
    run.folder.mkdir(parents=True)
    run.create(Config(overwrite=True))  # an empty folder is nobody's
    thesis = run.folder.parent / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").touch()
    with pytest.raises(UserError, match="thesis is not a run folder"):
        RunFolder(thesis).create(Config(overwrite=True))
    assert files(thesis) == ["chapter.tex"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for run, overwrite in ((tmp_path / "file" / "one", False), (tmp_path / "file", True)):
        with pytest.raises(UserError, match=r"cannot make the folder .*file.*Not a directory.*--runs DIR"):
            RunFolder(run).create(Config(overwrite=overwrite))


# Files


def test_metrics_are_one_line_a_row(run):
    run.create(Config())
    rows = [{"epoch": 1, "train/loss": 0.1 + 0.2}, {"epoch": 2, "train/loss": float("inf")}]
    for row in rows:
        run.append_metrics(row)
    assert run.read_metrics() == [rows[0], {"epoch": 2, "train/loss": None}], "strict JSON has no infinity"
    assert len(run.metrics.read_text().splitlines()) == 2


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def break_off() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert (files(tmp_path), path.read_text()) == (["file"], "old")
    with replacing(path) as partial:
        partial.write_text("new")
    assert (files(tmp_path), path.read_text()) == (["file"], "new")


class Unsavable(torch.nn.Linear):
    """Fails when its state is written, after the first bytes."""

    def state_dict(self, *args, **kwargs):
        return super().state_dict(*args, **kwargs) | {"bad": torch.nn.Parameter(torch.ones(1)), "worse": Unpicklable()}


class Unpicklable:
    def detach(self):
        return self

    cpu = contiguous = detach

    def __reduce__(self):
        raise RuntimeError("no")


def test_best_weights_that_cannot_be_written_leave_the_earlier_ones(run):
    run.create(Config())
    network = torch.nn.Linear(2, 1)
    run.save_best(network, {"epoch": 1})
    with pytest.raises(MachineError, match="cannot be saved"):
        run.save_best(Unsavable(2, 1), {"epoch": 2})
    assert torch.equal(torch.load(run.best, weights_only=True)["weight"], network.weight)
    assert json.loads((run.folder / "model.json").read_text()) == {"epoch": 1}
    assert files(run.folder) == ["best.pt", "config.yaml", "figures", "model.json", "status.json"]


def test_best_weights_are_contiguous_whatever_the_memory_format(run):
    run.create(Config())
    network = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    run.save_best(network, {})
    weight = torch.load(run.best, weights_only=True)["weight"]
    assert weight.is_contiguous()
    assert not weight.requires_grad
    assert torch.equal(weight, network.weight)


def test_model_json_says_what_a_reader_needs(photo_folder, run):
    photos = photo_folder({"train": {"ant": 2, "bée": 1}, "val": {"ant": 1}})
    dataset: Dataset = load_dataset(scan_dataset(photos, photos / "cache", 0.2))
    run.create(Config())
    config = Config(arch="resnet34", image_size=96, resize=128)
    run.save_best(torch.nn.Linear(1, 1), describe_model(config, dataset, {"epoch": 4, "val/top1": 0.75}))
    model = json.loads((run.folder / "model.json").read_text(encoding="utf-8"))
    assert model.pop("versions") == versions()
    assert model == {
        "arch": "resnet34",
        "classes": ["ant", "bée"],
        "image_size": 96,
        "resize": 128,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "transparency": "white",
        "scores": {"epoch": 4, "val/top1": 0.75},
        "data": str(photos),
        "dataset_fingerprint": dataset.fingerprint,
    }


def test_model_json_names_the_photos_so_that_they_are_found_again(photo_folder, monkeypatch):
    photos = photo_folder({"train": {"ant": 2, "bee": 2}, "val": {"ant": 1}})
    (photos / "photos.csv").write_text("path,label\ntrain/ant/00.jpg,ant\ntrain/bee/00.jpg,bee\n")
    monkeypatch.chdir(photos)
    for data, expected in ((None, photos), ("shapes", photos), (".", photos), ("photos.csv", photos / "photos.csv")):
        dataset = load_dataset(scan_dataset(expected, photos / "cache", 0.2))
        assert describe_model(Config(data=data), dataset, {})["data"] == str(expected)


def test_versions_name_the_libraries_and_do_without_an_installed_dalitune(monkeypatch):
    assert {"torch", "torchvision", "accelerate", "numpy", "pillow"} <= versions().keys()
    assert torch.__version__.startswith(versions()["torch"])
    monkeypatch.setattr("pipelines.runs._LIBRARIES", ("torch", "no-such-library"))
    assert versions().keys() == {"torch"}
