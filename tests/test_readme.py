"""The README's commands run as they stand, in a clone with somebody's photos beside it.

What differs is said here: a training is ended after a few steps, eight GPUs are two processes on the CPU, and a free
port is taken. Of the commands that install, `.ci/run` begins with one; of those for Slurm, tests/test_slurm.py.
"""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.runs import environment

import pytest

HERE = {
    "--num_processes 8": "--num_processes 2 --main_process_port 0",
    "serve.py runs/NAME": "serve.py runs/NAME --port 0",
}
ENOUGH = " --max_steps 2"


def commands(heading: str) -> list[str]:
    """Those of the bash block below a heading, a line each."""
    _, _, after = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    block = re.search(r"^```bash\n(.*?)^```$", after, re.MULTILINE | re.DOTALL)
    assert block, heading
    return [re.sub(r"\s+#.*", "", line) for line in re.sub(r"\\\n\s*", "", block[1]).splitlines()]


@pytest.fixture
def type_here(photos, random_weights, tmp_path) -> Callable[[str], subprocess.Popen]:
    """Starts a command in a shell, in a clone."""
    for file in ROOT.iterdir():
        if file.name in ("train.py", "evaluate.py", "configs", "pipelines", "deploy", "slurm"):
            (tmp_path / file.name).symlink_to(file)
    for folder in ("photos", "ILSVRC2012"):
        shutil.copytree(photos, tmp_path / folder)
    shutil.copytree(photos / "val", tmp_path / "others")
    known = sorted((tmp_path / "photos" / "train").rglob("*.jpg"))
    shutil.copy(known[0], tmp_path / "photo.jpg")
    lines = [f"{photo.relative_to(tmp_path)},{photo.parent.name}" for photo in known]
    (tmp_path / "photos.csv").write_text("\n".join(["path,label", *lines]))
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    variables = environment(DALITUNE_DATA=str(photos), DALITUNE_WEIGHTS=str(random_weights), PATH=path)

    def type_here(command: str) -> subprocess.Popen:
        runs = [run.name for run in (tmp_path / "runs").glob("*") if (run / "best.pt").exists()]
        for written, meant in HERE.items():
            command = command.replace(written, meant)
        command = command.replace("NAME", runs[0] if runs else "NAME")
        if "train.py" in command and "--prepare" not in command:
            command += ENOUGH
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=tmp_path, env=variables, text=True, **streams)

    return type_here


@pytest.mark.slow
def test_the_commands_run(type_here):
    own, more, (prepare, *jobs) = commands("Your own photos"), commands("More GPUs"), commands("Slurm")
    assert all(job.startswith("sbatch ") for job in jobs)
    assert len(own) == 8
    for command in [*own, *more, prepare]:
        started = type_here(command)
        if "serve.py" in command:
            said = next(line for line in started.stdout if "http://" in line)
            started.send_signal(signal.SIGINT)
        said, _ = started.communicate(timeout=300)
        assert started.returncode in ((0, 130, -signal.SIGINT) if "serve.py" in command else (0,)), f"{command}\n{said}"
        assert "--multi_gpu" not in command or "processes: 2 on cpu" in said, said
