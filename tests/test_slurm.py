"""The real job scripts on a real Slurm: a private cluster of two nodes, without GPUs (`slurm_cluster.sh`)."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from tests.helpers.paths import ROOT

import pytest
from PIL import Image

CLUSTER = ROOT / "tests" / "helpers" / "slurm_cluster.sh"
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "ip")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PYTHONS = Path(sys.executable).parent
MISSING = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
PATIENCE = 600  # seconds for any one thing: a start takes half a minute, and more where others work beside it
STEPS = 12  # of an epoch
IN_EPOCH_2 = str(STEPS + 1 + 3)  # rows: an epoch's steps, its evaluation, three steps more
SMALL = [*("--image-size", "64", "--resize", "72", "--batch-size", "8", "--epochs", "2", "--log-every", "1")]
SMALL += ["--tracker", "none", "--deterministic", "--lr", "0.005", "--batchnorm", "frozen"]
SMALL += ["--freeze", "layer3", "--head-init", "zeros"]
SHRUNK = ["--max-steps", "4", "--shrink", "80", "--loader", "pillow"]

# Loaded by every Python of a job: its main process stops itself when it is about to write one row more than HOLD_AFTER
# says, a number for each attempt at the job. So a test finds the training where it wants it, on a machine of any speed.
HOLD = """
import os, signal, sys

rows = os.environ.get("HOLD_AFTER", "").split()[int(os.environ.get("SLURM_RESTART_COUNT", "0")):][:1]


def count_down(event, arguments, left=[int(rows[0]) if rows else -1]):
    if event == "open" and arguments[1] == "a" and str(arguments[0]).endswith("metrics.jsonl"):
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), signal.SIGSTOP)


sys.addaudithook(count_down)
"""

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm's daemons are not all installed: {', '.join(MISSING)} missing"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="the cluster's daemons need root"),
]


class Job:
    """A submitted job, or a task of an array, seen from outside."""

    def __init__(self, lab: "Lab", number: str) -> None:
        self.lab, self.number = lab, number
        self.log = lab.folder / f"slurm-{number}.out"
        self.folder = lab.folder / f"slurm-{number}"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        words = self.lab.slurm("scontrol", "show", "job", "-o", self.number).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def status(self) -> dict:
        return json.loads((self.run / "status.json").read_text())

    def rows(self) -> list[dict]:
        """metrics.jsonl without what depends on time."""
        lines = (self.run / "metrics.jsonl").read_text().splitlines() if (self.run / "metrics.jsonl").exists() else []
        rows = [json.loads(line) for line in lines]
        return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]

    def wait(self, what: str, condition: Callable[[], object], *, pause: float = 0.5) -> None:
        give_up = time.monotonic() + PATIENCE
        looked = 0.0
        while not condition():
            if time.monotonic() > looked + 1:  # not more often: each look at Slurm takes time from the training
                looked = time.monotonic()
                assert looked < give_up, f"no sign of {what}\n{self.facts()}\n{self.text()[-3000:]}"
                may_have_ended = what in ("its end", "SIGTERM")
                assert may_have_ended or not self.has_ended(), f"ended before {what}\n{self.facts()}\n{self.text()}"
            time.sleep(pause)

    def has_ended(self) -> bool:
        return self.facts()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

    def ends(self) -> str:
        self.wait("its end", self.has_ended)
        return self.facts()["JobState"]

    def is_held(self) -> None:
        """Waits until the main process has stopped itself, by HOLD."""
        self.wait("the hold", lambda: any(_state(rank)["State"][0] == "T" for rank in self.ranks()))

    def wakes_when_told(self) -> None:
        """Goes on once a SIGTERM has reached the process that is held, or a SIGCONT that Slurm sends with it."""
        bit = 1 << (signal.SIGTERM - 1)

        def is_told() -> bool:
            held = [state for rank in self.ranks() if (state := _state(rank))["State"][0] == "T"]
            return all((int(state["SigPnd"], 16) | int(state["ShdPnd"], 16)) & bit for state in held)

        self.wait("SIGTERM", is_told, pause=0.1)
        self.hold(signal.SIGCONT)

    def ranks(self) -> list[int]:
        """The process ids of the training processes, on both nodes."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            of_job = f"DALITUNE_JOB_FOLDER={self.folder.name}".encode() in environment
            if of_job and b"slurm.preflight" in command and b"accelerate" not in command and b"bash" not in command:
                found.append(int(folder.name))
        return found

    def hold(self, sign: signal.Signals) -> None:
        """SIGSTOP for all processes, until SIGCONT."""
        for rank in self.ranks():
            with suppress(ProcessLookupError):
                os.kill(rank, sign)


def _state(process: int) -> dict[str, str]:
    """/proc/PID/status; as of one that is stopped by nobody where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {"State": "X"}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


class Lab:
    """The cluster, and a folder to submit from: the suite by links, so that logs do not land in the checkout."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "WANDB_"))}
        # The nodes have no GPU: where one is asked for, it is a name, and the training is to use the CPU.
        self.environment = {**kept, "ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "PASSIVE", **variables}
        self.environment.pop("DALITUNE_DATA", None)
        (folder / "hold").mkdir()
        (folder / "hold" / "sitecustomize.py").write_text(HOLD)
        self.environment["PYTHONPATH"] = str(folder / "hold")
        for name in ("train.py", "pipelines", "slurm", "configs", "accelerate_config.yaml"):
            (folder / name).symlink_to(ROOT / name)

    def slurm(self, *command: str, **variables: str) -> str:
        environment = {**self.environment, **variables}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, options: list[str], arguments: list[object], **variables: str) -> Job:
        words = [str(argument) for argument in arguments]
        number = self.slurm("sbatch", "--parsable", *options, f"slurm/{script}", *words, **variables).strip()
        return Job(self, number)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    tools = {"PATH": f"{Path(sys.executable).parent}:{PATH}", "SLURM_CLUSTER": str(folder / "cluster")}
    environment = {**os.environ, **tools}
    (folder / "job").mkdir()
    started = subprocess.run([CLUSTER, "start"], env=environment, capture_output=True, text=True, timeout=120)
    try:
        if started.returncode:
            pytest.skip(f"the cluster does not start on this machine: {started.stderr.strip()[-500:]}")
        variables = {**tools, "SLURM_CONF": str(folder / "cluster" / "slurm.conf"), "DALITUNE_CACHE": str(folder / "c")}
        yield Lab(folder / "job", variables)
    finally:
        subprocess.run([CLUSTER, "stop"], env=environment, capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def training(photo_folder, random_weights) -> list[object]:
    photos = photo_folder({"train": {"ant": 4 * STEPS, "bee": 4 * STEPS}, "val": {"ant": 5, "bee": 6}})
    return ["--data", photos, "--weights", random_weights, *SMALL]


@pytest.fixture(scope="module")
def photo_sizes(training) -> list[tuple[int, int]]:
    sizes = []
    for path in Path(str(training[1])).rglob("*.jpg"):
        with Image.open(path) as photo:
            sizes.append(photo.size)
    return sizes


@pytest.fixture(scope="module")
def shrunk_on_one_node(lab, training) -> Job:
    job = lab.submit("train.sbatch", ["--gpus-per-node=0"], [*training, *SHRUNK])
    assert job.ends() == "COMPLETED", job.text()
    return job


@pytest.fixture(scope="module")
def undisturbed(lab, training) -> Job:
    job = lab.submit("train.sbatch", ["--gpus-per-node=0"], training)
    assert job.ends() == "COMPLETED", job.text()
    return job


def on_node2(lab: Lab) -> list[str]:
    """The beginning of a command that sees the disks that node2 does."""
    holder = (Path(lab.environment["SLURM_CLUSTER"]) / "run" / "node2.pid").read_text().strip()
    return ["nsenter", "-t", holder, "-m"]


@contextmanager
def node2s_own_disk(lab: Lab, folder: Path) -> Iterator[None]:
    """There, a folder of both nodes is one of node2 alone."""
    subprocess.run([*on_node2(lab), "mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run([*on_node2(lab), "umount", str(folder)], check=True, timeout=60)


def revive(lab: Lab) -> None:
    subprocess.run([CLUSTER, "start"], env=lab.environment, capture_output=True, timeout=120, check=True)


def assert_same_training(job: Job, undisturbed: Job, *, processes: int = 1) -> None:
    """The same rows, each once: bit for bit, but to a tolerance on two processes, which sum in another order."""
    rows, expected = job.rows(), undisturbed.rows()
    assert [row["global_step"] for row in rows] == [row["global_step"] for row in expected]
    if processes == 1:
        assert rows == expected
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            if "loss" in key or "lr/" in key:  # near chance a rounding turns an answer, and then what is made of it
                assert row[key] == pytest.approx(other[key], rel=0.01), key


def test_one_node(undisturbed):
    text = undisturbed.text()
    assert re.search(r"preflight: node\d: processes 0; CPU, \d+ cores", text)
    assert "the first all-reduce of 1 process" in text
    assert (undisturbed.folder / "rank-0.log").read_text().strip() in text
    assert undisturbed.run.resolve() == undisturbed.lab.folder / "runs" / f"finetune-{undisturbed.number}"
    assert undisturbed.status()["state"] == "finished"
    assert undisturbed.status()["global_step"] == 2 * STEPS


def test_a_second_training_in_a_job_gets_a_name_of_its_own(lab, training):
    """In a loop as in an allocation: the job's number is that of the first one that the job script starts."""
    words = shlex.join([str(word) for word in [*training, "--max-steps", "1"]])
    script = f"for _ in 1 2; do bash slurm/train.sbatch {words} || exit; done; python train.py {words}"
    number = lab.slurm("sbatch", "--parsable", "--gpus-per-node=0", "-o", "slurm-%j.out", "--wrap", script).strip()
    job = Job(lab, number)
    assert job.ends() == "COMPLETED", job.text()
    names = re.findall(r"\nrun: runs/(.*)\n", job.text())
    assert names[0] == f"finetune-{number}"
    assert all(re.fullmatch(r"finetune-\d{8}-\d{6}-[a-z]{4}", name) for name in names[1:])
    assert len(set(names)) == 3
    assert job.run.resolve().name == names[1]


def test_two_nodes_of_which_one_dies_in_mid_epoch(lab, training, undisturbed):
    job = lab.submit("train.sbatch", ["--nodes=2", "--gpus-per-node=0"], training, HOLD_AFTER=IN_EPOCH_2)
    job.is_held()
    job.hold(signal.SIGSTOP)
    assert len(job.ranks()) == 2
    other = "node2" if job.facts()["BatchHost"] == "node1" else "node1"
    subprocess.run([CLUSTER, "kill", other], env=lab.environment, timeout=60, check=True)
    job.hold(signal.SIGCONT)
    job.wait("the requeue", lambda: job.facts()["Restarts"] == "1")
    revive(lab)
    assert job.ends() == "COMPLETED", job.text()
    text = job.text()
    for node in ("node1", "node2"):
        assert text.count(f"preflight: {node}: ") == 2, "once in each attempt"
    assert text.count(f"\nrun: runs/finetune-{job.number}\n") == 2, "said once for all nodes"
    assert "the first all-reduce of 2 processes" in text
    assert f"resumed at step {STEPS}" in text
    assert (job.folder / "rank-1.log").exists()
    assert_same_training(job, undisturbed, processes=2)


def test_the_time_limit_comes_near(lab, training, undisturbed):
    """Slurm's warning comes up to a minute early, and is sent every half minute."""
    limit = ["--gpus-per-node=0", "--signal=B:USR1@60", "--time=20"]
    job = lab.submit("train.sbatch", limit, training, HOLD_AFTER=IN_EPOCH_2)
    job.is_held()
    hours, minutes, seconds = map(int, job.facts()["RunTime"].split(":"))
    lab.slurm("scontrol", "update", f"jobid={job.number}", f"timelimit={hours * 60 + minutes + 1 + (seconds > 30)}")
    job.wait("the warning", (job.run / "STOP").exists)
    job.hold(signal.SIGCONT)
    job.wait("the requeue", lambda: job.facts()["Restarts"] == "1")
    assert job.status()["state"] == "stopped"
    stopped_at = job.status()["global_step"]
    assert STEPS + 3 <= stopped_at < 2 * STEPS
    lab.slurm("scontrol", "update", f"jobid={job.number}", "timelimit=20")
    assert job.ends() == "COMPLETED", job.text()
    assert f"resumed at step {stopped_at}" in job.text()
    assert_same_training(job, undisturbed)


def test_sent_back_by_hand_and_then_cancelled(lab, training):
    """Two nodes. Slurm decides both times, and the script does not bring a cancelled job back."""
    job = lab.submit("train.sbatch", ["--nodes=2", "--gpus-per-node=0"], training, HOLD_AFTER="3 1")
    job.is_held()
    assert len(job.ranks()) == 2
    lab.slurm("scontrol", "requeue", job.number)
    job.wakes_when_told()
    job.wait("the second attempt", lambda: "resumed at step" in job.text())
    stopped_at = int(re.search(r"resumed at step (\d+)", job.text())[1])
    assert stopped_at >= 3, "saved on the way out, in mid-epoch"
    job.is_held()
    lab.slurm("scancel", job.number)
    job.wakes_when_told()
    assert job.ends() == "CANCELLED"
    job.wait("its end", lambda: not job.ranks())
    assert job.status()["state"] == "stopped"
    assert job.facts()["Restarts"] == "1"
    assert job.text().count("preflight: the first all-reduce of 2 processes") == 2


def test_preempted_on_staged_photos(lab, training, undisturbed, tmp_path):
    photos = Path(str(training[1]))
    with tarfile.open(f"{photos}.tar", "w") as tar:
        tar.add(photos, arcname=".")
    staged = {"STAGE": "1", "LOCAL_DISK": str(tmp_path), "DALITUNE_DATA": f"{photos}/", "HOLD_AFTER": IN_EPOCH_2}
    job = lab.submit("train.sbatch", ["--gpus-per-node=2", "--nodelist=node1"], training[2:], **staged)
    job.is_held()
    lab.slurm("sbatch", "-p", "urgent", "--nodelist=node1", "--gpus-per-node=2", "-o", "urgent.out", "--wrap", "date")
    job.wakes_when_told()
    job.wait("the requeue", lambda: job.facts()["Restarts"] == "1")
    assert job.ends() == "COMPLETED", job.text()
    assert re.search(r"resumed at step 1[5-9]|resumed at step 2\d", job.text()), "not at the end of an epoch: saved"
    assert "preflight: node1: processes 0, 1; CPU" in job.text(), "a process for each GPU that was asked for"
    assert f"data: {tmp_path}/dalitune-{job.number} " in job.text()
    assert not any(tmp_path.iterdir()), "the node's disk is left as it was"
    assert_same_training(job, undisturbed, processes=2)


def test_what_is_staged_is_there_and_is_what_is_read(tmp_path):
    def refused(*flags: str, data: str) -> str:
        names = {"STAGE": "1", "DALITUNE_DATA": data, "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{PYTHONS}:{PATH}"}
        command = ["bash", "slurm/train.sbatch", *flags]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **names}, capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr

    assert f"no file {tmp_path}/photos.tar\n" in refused(data=f"{tmp_path}/photos/")
    (tmp_path / "photos.tar").touch()
    line = "error: data: other would be read in place of what STAGE=1 unpacks: leave one of the two out\n"
    assert refused("--data", "other", data=f"{tmp_path}/photos") == line


STANDINS = {
    "srun": """
        until [ -e "$DALITUNE_JOB_FOLDER/run/STOP" ]; do sleep 0.1; done
        echo '{"state": "stopped", "exit_code": 2, "global_step": '"$STEPS"'}' >"$DALITUNE_JOB_FOLDER/run/status.json"
    """,
    "scontrol": '[ "$2" = hostnames ] && echo localhost; [ "$1" != requeue ]',  # which no site allows here
}


def test_with_standins_for_slurm_a_job_without_progress_is_not_requeued(tmp_path):
    """Where the time is over before the first step, it would be started and stopped for ever."""
    folder = tmp_path / "slurm-7"
    (tmp_path / "bin").mkdir()
    for name, lines in STANDINS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "runs" / "named").mkdir(parents=True)
    folder.mkdir()
    (folder / "run").symlink_to(tmp_path / "runs" / "named")
    for name in ("pipelines", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)

    def attempt(number: int, steps: int) -> str:
        names = {"STEPS": steps, "SLURM_RESTART_COUNT": number, "SLURM_JOB_ID": 7, "SLURM_NNODES": 1}
        names |= {"SLURM_SUBMIT_DIR": tmp_path, "PATH": f"{tmp_path / 'bin'}:{PYTHONS}:{PATH}"}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(["bash", ROOT / "slurm" / "train.sbatch"], env=environment, **pipes) as job:
            started = folder / ".started"
            while not (started.exists() and started.read_text() == f"{number}\n"):
                time.sleep(0.1)
            time.sleep(1)
            job.send_signal(signal.SIGUSR1)
            said, _ = job.communicate(timeout=60)
        return said

    forbidden = "error: Slurm has not requeued the job: submit it again with --run named to go on\n"
    too_short = "error: not requeued, as the time limit came before a step was trained: give a longer --time\n"
    for number, steps in enumerate((0, 0, 5)):
        said = attempt(number, steps)
        assert said == (too_short if number == 1 else f"requeued, ahead of the time limit\n{forbidden}")


def test_a_sweep_gives_each_task_its_run_and_refuses_bad_lines(lab, training):
    lines = ["--lr 0.01 --max-steps 2 --group 'one group'", "--lr 0.02 --max-steps=2", "--lrr 0.1", "--run mine"]
    lines += ["--lr $(touch ran)", "--lr '0.1"]
    (lab.folder / "sweep.txt").write_text("\n".join(lines) + "\n")
    common = [*training]
    del common[common.index("--lr") : common.index("--lr") + 2]
    array = lab.submit("sweep.sbatch", ["--gpus-per-node=0", "--array=1-6%2"], ["sweep.txt", *common]).number
    tasks = [Job(lab, f"{array}_{number}") for number in range(1, 7)]
    assert [task.ends() for task in tasks] == ["COMPLETED", "COMPLETED", *["FAILED"] * 4]
    assert "group: one group\n" in (tasks[0].run / "config.yaml").read_text()
    assert not (lab.folder / "ran").exists(), "no shell runs what is in a line"
    assert "error: " in tasks[4].text()
    assert tasks[5].text().endswith("error: sweep.txt: an open quote: --lr '0.1\n")
    for number, rate in ((1, 0.01), (2, 0.02)):
        run = tasks[number - 1].run.resolve()
        assert run.name == f"finetune-{array}-{number}"
        assert f"lr: {rate}\n" in (run / "config.yaml").read_text()
    # Before anything is started: no preflight, no trace of a launcher.
    assert tasks[2].text() == "error: unknown flag '--lrr'; the nearest is --lr; --help lists all\n"
    assert tasks[3].text() == "error: sweep.txt: --run would put tasks into one run folder; leave it out\n"
    assert [task.facts()["ExitCode"] for task in tasks[2:]] == ["2:0"] * 4


def test_photos_are_unpacked_on_each_nodes_own_disk_only(lab, training, tmp_path):
    photos = Path(training[1])
    with tarfile.open(f"{photos}.tar", "w") as tar:
        tar.add(photos, arcname=".")
    staged = {"STAGE": "1", "LOCAL_DISK": str(tmp_path), "DALITUNE_DATA": str(photos)}
    nodes = ["--nodes=2", "--gpus-per-node=0"]
    shared = lab.submit("train.sbatch", nodes, training[2:], **staged)
    assert shared.ends() == "FAILED"
    assert "error: LOCAL_DISK is one for all nodes" in shared.text()
    (tmp_path / f"dalitune-{int(shared.number) + 1}").symlink_to(photos)
    foreign = lab.submit("train.sbatch", nodes, training[2:], **staged)
    assert foreign.ends() == "FAILED"
    assert "is not a folder of this user: set LOCAL_DISK" in foreign.text()


def test_a_job_with_a_task_for_each_gpu_and_no_environment(lab, training):
    """As many write their jobs, at a site that exports nothing, and whose scripts do not stand `set -u`."""
    activate = lab.folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    needed = ("PATH", "SLURM_CONF", "DALITUNE_CACHE", "OMP_WAIT_POLICY", "ACCELERATE_USE_CPU")
    exports = [f"export {name}={lab.environment[name]}" for name in needed]
    activate.write_text("\n".join(['echo "site: $NOT_SET_ANYWHERE"', *exports]) + "\n")
    options = ["--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=2", "--export=NONE"]
    try:
        job = lab.submit("train.sbatch", options, [*training, "--max-steps", "2"])
        assert job.ends() == "COMPLETED", job.text()
    finally:
        shutil.rmtree(lab.folder / ".venv")
    text = job.text()
    assert text.startswith("site: \n")
    for node, ranks in (("node1", "0, 1"), ("node2", "2, 3")):
        assert text.count(f"preflight: {node}: processes ") == 1
        assert f"preflight: {node}: processes {ranks}" in text
    assert "the first all-reduce of 4 processes" in text
    assert text.count("\nrun: runs/") == 1
    assert job.status()["state"] == "finished"


def test_a_run_folder_that_is_not_shared(lab, training):
    runs = lab.folder / "unshared"
    runs.mkdir()
    with node2s_own_disk(lab, runs):
        job = lab.submit("train.sbatch", ["--nodes=2", "--gpus-per-node=0"], [*training, "--runs", runs])
        assert job.ends() == "FAILED"
    assert re.search(rf"error: run folder {runs}/finetune-\d+: .* not seen on node2", job.text()), job.text()
    assert not any(runs.iterdir())


@pytest.mark.parametrize("cache", ["shared", "of each node"])
def test_large_photos_are_shrunk_by_all_nodes_together_or_by_each_for_itself(
    lab, training, photo_sizes, shrunk_on_one_node, cache
):
    """Then all processes read the same pixels: the training is one node's, to rounding."""
    folder = lab.folder / f"cache {cache}"
    folder.mkdir()
    with node2s_own_disk(lab, folder) if cache == "of each node" else nullcontext():
        job = lab.submit(
            "train.sbatch", ["--nodes=2", "--gpus-per-node=0"], [*training, *SHRUNK], DALITUNE_CACHE=str(folder)
        )
        assert job.ends() == "COMPLETED", job.text()
        find = [*on_node2(lab), "find", str(folder), "-type", "f"]
        listed = subprocess.run(find, check=True, capture_output=True, text=True, timeout=60)
    large = sum(min(size) > 80 for size in photo_sizes)
    assert job.text().count(f"shrink: {large} of {len(photo_sizes)} photos are read from copies of 80 pixels") == 1
    assert "the first all-reduce of 2 processes" in job.text()
    seen_by_node2 = [Path(line) for line in listed.stdout.splitlines() if "/shrunk/" in line]
    seen_by_node1 = [path for path in (folder / "shrunk").rglob("*") if path.is_file()]
    for seen in (seen_by_node1, seen_by_node2):
        assert len([path for path in seen if path.suffix == ".jpg"]) == large
        assert not [path for path in seen if path.suffix == ".tmp"]
    assert_same_training(job, shrunk_on_one_node, processes=2)
