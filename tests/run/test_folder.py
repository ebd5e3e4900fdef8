"""What a run leaves: whole files, a name of its own, and a status that programs can read."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipelines.config import Config, dump_yaml, parse_config
from pipelines.data.dataset import Dataset, load_dataset, scan_dataset
from pipelines.errors import MachineError, UserError
from pipelines.run.folder import RunFolder, describe_model, new_run_name, versions
from tests.helpers.paths import ROOT

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


def test_only_the_job_scripts_training_is_named_after_the_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")  # as in an allocation, from a notebook, in a loop
    assert re.fullmatch(OWN_NAME, new_run_name("finetune"))
    for job in ("4711", "4700-3"):
        monkeypatch.setenv("DALITUNE_JOB", job)
        assert new_run_name("finetune") == f"finetune-{job}"


def test_under_a_wandb_agent_a_run_has_the_agents_name(monkeypatch, tmp_path):
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
    assert (run.folder / "config.yaml").read_text() == "format: 1\n" + dump_yaml(config)
    assert parse_config([f"--config={run.folder / 'config.yaml'}"])[0] == config
    where = {"epoch": 0, "global_step": 0, "job": None}
    assert run.status() == {"state": "running", "reason": "", "exit_code": None, **where}


def test_the_other_processes_write_nothing(tmp_path):
    run = RunFolder(tmp_path / "one", writes=False)
    run.create(Config(overwrite=True))
    run.write_status("finished")
    run.append_metrics({"epoch": 1, "global_step": 5})
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
    # The flags of a job that Slurm starts again are those of its first attempt.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run.beginning(Config(epochs=6, overwrite=True)) == "resumed"
    # But one that was requeued before it came so far has done nothing yet to what another has left.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run.beginning(Config(epochs=6, overwrite=True)) == "new"
    run.write_status("running")
    assert run.beginning(Config(epochs=6, overwrite=True)) == "resumed"


def test_a_resumed_run_keeps_what_is_in_its_folder(run):
    run.create(Config())
    run.append_metrics({"epoch": 1, "global_step": 5})
    length = run.metrics_bytes()
    run.append_metrics({"epoch": 2, "global_step": 10})
    run.write_status("stopped")
    run.close()
    again = RunFolder(run.folder)
    again.create(Config(epochs=7), resumed=True)
    assert again.status()["state"] == "stopped"
    assert "epochs: 7" in (run.folder / "config.yaml").read_text()
    assert len(again.read_metrics()) == 2
    again.cut_metrics(length)
    assert again.read_metrics() == [{"epoch": 1, "global_step": 5}]
    again.cut_metrics(length + 100)
    assert again.metrics_bytes() == length


def test_a_folder_that_is_no_run_is_in_the_way(run):
    run.folder.mkdir(parents=True)
    (run.folder / "notes.txt").write_text("mine")
    for action in (run.beginning, run.create):
        with pytest.raises(UserError, match="is not a run folder"):
            action(Config())


def test_overwrite_starts_anew(run):
    run.create(Config())
    run.append_metrics({"epoch": 1, "global_step": 5})
    run.save_best(torch.nn.Linear(1, 1), {})
    run.create(Config(lr=0.5, overwrite=True))
    assert files(run.folder) == ["config.yaml", "figures", "status.json"]
    assert "lr: 0.5" in (run.folder / "config.yaml").read_text()


def test_a_runs_own_recipe_does_not_start_it_anew(run):
    run.create(Config(overwrite=True))
    run.close()
    config, _ = parse_config([f"--config={run.folder / 'config.yaml'}"])
    assert config == Config()
    assert run.beginning(config) == "resumed"


def test_overwrite_never_removes_what_is_no_run(run, capsys):
    run.folder.mkdir(parents=True)
    run.create(Config(overwrite=True))  # an empty folder is nobody's
    thesis = run.folder.parent / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").touch()
    # Many a project has files of these names.
    for name, text in (("", ""), ("config.yaml", "title: my thesis"), ("status.json", '{"state": "running"}')):
        if name:
            (thesis / name).write_text(text)
        for action in (RunFolder(thesis).beginning, RunFolder(thesis).create):
            with pytest.raises(UserError, match="thesis is not a run folder"):
                action(Config(overwrite=True))
        assert "chapter.tex" in files(thesis)
        assert not (thesis / ".lock").exists()


def test_overwrite_removes_only_what_a_run_has_written(run, capsys):
    run.create(Config())
    ours = [
        "best.pt",
        ".best.pt.tmp",
        "report.html",
        ".report.html.tmp",
        "model.json",
        "metrics.jsonl",
        "wandb_id",
        "wandb/offline-run-1/x",
    ]
    ours += ["checkpoints/epoch-0001-step-00000005/state.pt", "checkpoints/.unfinished/x", "tensorboard/events"]
    ours += ["figures/curves.png", "figures/predictions_test.png", "figures/explanations_val.png"]
    ours += ["figures/predictions_test.csv", "figures/predictions_test.json"]
    ours += ["export/model.onnx", "export/README.md"]
    ours += [".export-abc/model.onnx"]
    theirs = ["thesis.tex", "figures/mine.png", "export/notes.txt", "checkpoints/epoch-old/x", "notes/best.pt"]
    for name in ours + theirs:
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).touch()
    away = run.folder.parent / "away"
    away.mkdir()
    (away / "run-1").touch()
    (run.folder / "wandb" / "latest-run").symlink_to(away)
    run.create(Config(overwrite=True))
    found = [str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()]
    assert sorted(found) == sorted([".lock", "config.yaml", "status.json", *theirs])
    assert files(away) == ["run-1"]
    line = f"left as it is in {run.folder}: checkpoints, export, figures, notes, thesis.tex"
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize("name", ["checkpoints", "figures", "metrics.jsonl", "wandb", "wandb_id", ".lock"])
@pytest.mark.parametrize("resumed", [True, False])
def test_nothing_is_written_through_a_link_that_leaves_the_run(name, resumed, run, tmp_path):
    run.create(Config())
    run.close()
    away = tmp_path / "away"
    away.mkdir()
    target = away if "." not in name and name != "wandb_id" else away / "file"
    (run.folder / name).rmdir() if name == "figures" else (run.folder / name).unlink(missing_ok=True)
    (run.folder / name).symlink_to(target)
    again = RunFolder(run.folder)
    if resumed or name == ".lock":
        with pytest.raises(UserError, match=f"{name} is a link that leads out of the run"):
            again.create(Config(overwrite=True), resumed=resumed)
    else:  # it is the link that is removed
        again.create(Config(overwrite=True))
        assert not (run.folder / name).is_symlink()
        again.close()
    assert files(away) == []


def test_a_link_that_stays_in_the_run_is_used(run):
    run.create(Config())
    run.close()
    (run.folder / "elsewhere").mkdir()
    (run.folder / "checkpoints").symlink_to("elsewhere")
    run.create(Config(), resumed=True)


@pytest.mark.parametrize("left", ["", ".lock", ".lock .unbegun", ".lock .unbegun config.yaml best.pt"])
def test_a_run_that_never_began_is_not_in_the_way(left, run):
    run.folder.mkdir(parents=True)
    for name in left.split():
        (run.folder / name).touch()
    assert run.beginning(Config()) == "new"
    run.create(Config())
    assert files(run.folder) == ["config.yaml", "figures", "status.json"]


def test_who_loses_a_race_reads_what_is_true(run):
    first, second, third = (RunFolder(run.folder) for _ in range(3))
    assert first.beginning(Config()) == second.beginning(Config()) == "new"
    first.create(Config())
    for action in (second.create, third.beginning):
        with pytest.raises(UserError, match="another run is writing into"):
            action(Config())
    first.close()
    with pytest.raises(UserError, match="another run has just been started"):
        second.create(Config())
    assert third.beginning(Config()) == "resumed"
    with pytest.raises(UserError, match="another run is writing into"):  # what a resume reads stays true
        RunFolder(run.folder).beginning(Config())


def test_a_finished_run_with_nothing_to_do_is_free_again(run):
    run.create(Config())
    run.write_status("finished", exit_code=0)
    run.close()
    assert run.beginning(Config()) == "finished"
    assert RunFolder(run.folder).beginning(Config(epochs=99)) == "resumed"


def test_a_stop_request_does_not_reach_the_next_attempt(run, monkeypatch, capsys):
    run.create(Config())
    run.stop_file.touch()  # after the last step, so that nobody has answered it
    run.close()
    assert not run.stop_file.exists()
    for requeued in (False, True):  # a kill leaves it
        run.stop_file.touch()
        if requeued:
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        again = RunFolder(run.folder)
        again.create(Config(), resumed=True)
        assert run.stop_file.exists() == requeued
        assert ("STOP is of an earlier attempt" in capsys.readouterr().err) != requeued
        again.close()


@pytest.mark.parametrize("missing", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_without_flock_the_file_to_remove_is_named(missing, run, monkeypatch):
    """A stand-in for a file system without locks, and for another machine, whose processes are not known here."""

    def no_flock(*_: object) -> None:
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr("fcntl.flock", no_flock)
    run.create(Config())
    held = Path(run._lock.lock_file)
    with pytest.raises(UserError, match=f"another run is writing.*remove {held}$"):
        RunFolder(run.folder).beginning(Config())
    marker = held.read_bytes()
    run.close()
    held.write_bytes(marker.replace(socket.gethostname().encode(), b"another-node"))
    with pytest.raises(UserError, match=f"remove {held}$"):
        RunFolder(run.folder).beginning(Config())
    held.unlink()
    assert RunFolder(run.folder).beginning(Config()) == "resumed"


ATTEMPT = """
import os, sys
from pathlib import Path
from pipelines.config import Config
from pipelines.run.folder import RunFolder
import torch

def attempt(folder, step, overwrite):
    run, config = RunFolder(folder), Config(epochs=2, lr=0.5, overwrite=overwrite, run="one")
    beginning = run.beginning(config)
    if beginning != "finished":
        run.create(config, resumed=beginning == "resumed")
        run.write_status("running")
        run.append_metrics({"epoch": 1, "global_step": 1})
        run.save_best(torch.nn.Linear(1, 1), {"epoch": 1})
        run.write_status("finished", "", 0, 2, 2)
        run.close()
    return beginning

def count_down(event, arguments, left=[0]):
    if left[0] and event.startswith(("open", "os.", "shutil.", "fcntl.")) and "/one" in str(arguments):
        left[0] -= 1
        if not left[0]:
            os._exit(9)

sys.addaudithook(count_down)
for line in sys.stdin:
    folder, step, overwrite, requeued = line.split()
    child = os.fork()
    if not child:
        os.environ["SLURM_RESTART_COUNT"] = requeued
        count_down.__defaults__[0][0] = int(step)
        try:
            print(attempt(Path(folder), int(step), overwrite == "1"), flush=True)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("killed", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("there", ["nothing", "a finished run of other settings"])
def test_a_kill_at_any_call_on_a_folder_blocks_no_later_run(there, tmp_path):
    """The attempt at a run without its training, killed before each call that touches the folder in turn."""
    with subprocess.Popen([sys.executable, "-c", ATTEMPT], stdin=-1, stdout=-1, text=True, cwd=ROOT) as attempts:
        assert attempts.stdin is not None
        assert attempts.stdout is not None

        def attempt(folder: Path, step: int = 0, overwrite: bool = False, requeued: bool = False) -> str:
            print(folder, step, int(overwrite), int(requeued), file=attempts.stdin, flush=True)
            return attempts.stdout.readline().strip()

        step, began = 0, set()
        while True:
            step += 1
            folder = tmp_path / str(step) / "one"
            if there != "nothing":
                old = RunFolder(folder)
                old.create(Config(epochs=2, lr=0.125))
                (folder / "checkpoints" / "epoch-0001-step-00000005").mkdir(parents=True)
                (folder / "export").mkdir()
                for name in ("best.pt", "checkpoints/epoch-0001-step-00000005/state.pt", "export/model.onnx", "thesis"):
                    (folder / name).touch()
                old.write_status("finished", "", 0, 2, 2)
                old.close()
            overwrite = there != "nothing"
            first = attempt(folder, step, overwrite)
            if first != "killed":
                break
            names = set(files(folder)) if folder.exists() else set()
            before = (folder / "config.yaml").read_text() if "config.yaml" in names else ""
            # As Slurm starts a job again, and as a person does.
            again = attempt(folder, requeued=True) if step % 2 or not overwrite else attempt(folder, overwrite=True)
            if again.startswith("UserError"):  # of the old run nothing is gone yet
                assert "other settings (lr)" in again
                assert "lr: 0.125" in before
                assert {"best.pt", "export/model.onnx", "thesis"} <= names
                again = attempt(folder, overwrite=True)
            assert again in ("new", "resumed", "finished"), again
            began.add(again)
            assert "lr: 0.5" in (folder / "config.yaml").read_text()
            assert json.loads((folder / "status.json").read_text())["state"] == "finished"
            assert "checkpoints/epoch-0001-step-00000005" not in files(folder)
            assert not {".unbegun", "STOP"} & set(files(folder))
            assert ("thesis" in files(folder)) == (there != "nothing")
        attempts.stdin.close()
    assert first == "new"
    assert step > 25
    assert began >= {"new", "resumed"}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for run, overwrite in ((tmp_path / "file" / "one", False), (tmp_path / "file", True)):
        with pytest.raises(UserError, match=r"cannot make the folder .*file.*(Not a dir|File exists).*--runs DIR"):
            RunFolder(run).create(Config(overwrite=overwrite))


@pytest.mark.parametrize("call", ["os.open", "pathlib.Path.iterdir"])
def test_a_run_of_somebody_else_is_one_line(call, run, monkeypatch):
    """A stand-in for a folder of another user: the administrator, who may run this test, may write everywhere."""
    run.create(Config())
    run.close()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        with pytest.raises(UserError) as error:
            RunFolder(run.folder).beginning(Config())
    assert f"cannot write into {run.folder} (Permission denied): give another --run, or --runs DIR" in str(error.value)


# Files


def test_metrics_are_one_line_a_row(run):
    run.create(Config())
    rows = [{"epoch": 1, "global_step": 5, "train/loss": 0.1 + 0.2}]
    rows += [{"epoch": 2, "global_step": 10, "train/loss": float("inf")}]
    for row in rows:
        run.append_metrics(row)
    assert run.read_metrics() == [rows[0], rows[1] | {"train/loss": None}], "strict JSON has no infinity"
    assert len(run.metrics.read_text().splitlines()) == 2


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


def test_a_failed_save_keeps_the_earlier_best_weights(run):
    run.create(Config())
    network = torch.nn.Linear(2, 1)
    run.save_best(network, {"epoch": 1})
    with pytest.raises(MachineError, match="cannot be saved"):
        run.save_best(Unsavable(2, 1), {"epoch": 2})
    assert torch.equal(torch.load(run.best, weights_only=True)["weight"], network.weight)
    assert json.loads((run.folder / "model.json").read_text()) == {"epoch": 1}
    assert files(run.folder) == ["best.pt", "config.yaml", "figures", "model.json", "status.json"]


def test_no_space_for_model_json_keeps_the_weights_that_it_is_of(run, monkeypatch):
    """Its temperature and thresholds are theirs."""
    run.create(Config())
    run.save_best(torch.nn.Linear(1, 1), {"epoch": 1}, lambda path: path.write_text("first"))
    before = {path.name: path.read_bytes() for path in run.best_files()}
    write_text = Path.write_text

    def full(self: Path, *arguments: Any, **options: Any) -> int:
        if "model.json" in self.name:
            raise OSError(28, "No space left on device")
        return write_text(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(MachineError, match="what was saved before is whole"):
            run.save_best(torch.nn.Linear(2, 1), {"epoch": 2}, lambda path: path.write_text("second"))
    assert {path.name: path.read_bytes() for path in run.best_files()} == before
    assert len(before) == 3


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
        "format": 1,
        "arch": "resnet34",
        "classes": ["ant", "bée"],
        "image_size": 96,
        "resize": 128,
        "crop_mode": "center",
        "shrink": None,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "transparency": "white",
        "test_flips": False,
        "scores": {"epoch": 4, "val/top1": 0.75},
        "data": str(photos),
        "dataset_fingerprint": dataset.fingerprint,
    }


def test_model_json_has_the_size_of_evaluations(photo_folder):
    photos = photo_folder({"train": {"ant": 2, "bee": 2}, "val": {"ant": 1}})
    dataset = load_dataset(scan_dataset(photos, photos / "cache", 0.2))
    model = describe_model(Config(image_size=64, eval_size=96, resize=100), dataset, {})
    assert (model["image_size"], model["resize"]) == (96, 100)


def test_model_json_names_the_photos_so_that_they_are_found_again(photo_folder, monkeypatch):
    photos = photo_folder({"train": {"ant": 2, "bee": 2}, "val": {"ant": 1}})
    (photos / "photos.csv").write_text("path,label\ntrain/ant/00.jpg,ant\ntrain/bee/00.jpg,bee\n")
    monkeypatch.chdir(photos)
    for data, expected in ((None, photos), ("shapes", photos), (".", photos), ("photos.csv", photos / "photos.csv")):
        dataset = load_dataset(scan_dataset(expected, photos / "cache", 0.2))
        assert describe_model(Config(data=data), dataset, {})["data"] == str(expected)


def test_versions_do_without_an_installed_dalitune(monkeypatch):
    assert {"torch", "torchvision", "accelerate", "numpy", "pillow"} <= versions().keys()
    assert torch.__version__.startswith(versions()["torch"])
    monkeypatch.setattr("pipelines.run.folder._LIBRARIES", ("torch", "no-such-library"))
    monkeypatch.setattr("pipelines.run.folder.libraries", lambda: ["pillow", "none-of-an-engine"])
    assert versions().keys() == {"torch", "pillow"}
