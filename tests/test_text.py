"""No name and no stream ends a run: what is printed reaches whoever still reads, in characters that they can read."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import train
from deploy import predict
from pipelines.distributed.exits import run_script
from pipelines.text import LastingStream, counted, lasting_streams, printable
from tests.helpers.paths import ROOT

import pytest
from tqdm import tqdm

CHINESE = "蚂蚁"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (os.fsdecode(b"K\xe4fer"), r"K\xe4fer"),
        (os.fsdecode(b"\xff\n.jpg"), r"\xff?.jpg"),
        (CHINESE, CHINESE),
        ("a\u3000b\u00a0c\u202ed\0", "a b c?d?"),
        ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"),
    ],
)
def test_a_name_is_shown_in_printable_characters(name: str, shown: str) -> None:
    assert printable(name) == shown
    shown.encode()


def broken(kind: str, buffering: int) -> tuple[io.TextIOWrapper, int]:
    """A stream on a pipe that nobody reads, or on a full disk; and the error that it gives."""
    if kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        return open(writer, "w", buffering), errno.EPIPE
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    return open("/dev/full", "w", buffering), errno.ENOSPC


@pytest.mark.parametrize("buffering", [1, 512])
@pytest.mark.parametrize("kind", ["pipe", "full disk"])
def test_a_stream_that_takes_nothing_any_more(
    kind: str, buffering: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    stream, number = broken(kind, buffering)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with lasting_streams():
            for _ in range(400):
                print(f"a class {CHINESE}")
            tqdm.write("beside a bar", file=sys.stdout)
            sys.stdout.flush()
            assert isinstance(sys.stdout, LastingStream)
            assert sys.stdout.error is not None
            assert sys.stdout.error.errno == number
        assert sys.stdout is stream
        stream.close()  # as at the interpreter's end: nothing is left in it that would fail again
    said = capsys.readouterr().err
    assert said.count("what is printed from here on is lost") == (kind != "pipe")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_encoding_that_lacks_a_character(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    held = sys.stdout
    with lasting_streams():
        print(CHINESE)
        print(CHINESE, file=held, flush=True)
        for _ in tqdm(range(2), desc=CHINESE, file=sys.stdout):
            pass
    assert written.getvalue().count(rb"\u8682\u8681") >= 3
    print("still open", flush=True)


def test_no_stream_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_streams():
        print("nowhere", file=sys.stderr)
        assert not sys.stderr.isatty()
        list(tqdm(range(2)))
    assert sys.stderr is None


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["cp1252", "closed pipe", "full disk"])
def test_a_training_goes_on_whatever_becomes_of_its_prints(
    stdout: str, photo_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = os.fsdecode(b"K\xe4fer")
    data = photo_folder({split: {CHINESE: 2, odd: 2} for split in ("train", "val")})
    settings = ["--image-size=64", "--resize=72", "--weights=none", "--freeze=none", "--batchnorm=train", "--epochs=1"]
    settings += ["--head-init=zeros", f"--data={data}", f"--runs={tmp_path}", "--run=r", "--tracker=none"]
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252") if stdout == "cp1252" else broken(stdout.split()[-1], 1)[0]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
        assert run_script(train.main, settings) == 0
    assert {path.name for path in (tmp_path / "r").iterdir()} >= {"best.pt", "model.json"}


@pytest.mark.slow
def test_answers_that_do_not_reach_stdout_are_a_failure(trained_run, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    photo = next(iter(trained_run.evaluated))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken("full disk", 1)[0])
        assert run_script(predict.main, [str(trained_run.folder), photo, "--csv=-", "--cpu"]) == 3
    assert "not all results could be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [((0, "photo"), "0 photos"), ((1, "class"), "1 class"), ((2, "class"), "2 classes"), ((1, "is", "are"), "1 is")],
)
def test_one_is_one(words: tuple[int, str], line: str) -> None:
    assert counted(*words) == line


def test_a_locale_without_utf8_changes_no_name() -> None:
    code = """
import os, sys
from pipelines.text import counted, name_of_folder, path_on_disk, printable
assert sys.getfilesystemencoding() == "ascii"
utf8, latin = "\u8682".encode(), b"K\\xe4fer"
assert name_of_folder(os.fsdecode(utf8)) == "\u8682"
assert name_of_folder(os.fsdecode(latin)) == "K\\udce4fer"
assert os.fsencode(path_on_disk("\u8682")) == utf8
assert path_on_disk(os.fsdecode(latin)) == os.fsdecode(latin)
assert printable(os.fsdecode(utf8 + latin)) == "\u8682K\\\\xe4fer"
"""
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    call = [sys.executable, "-c", code.encode("ascii", "backslashreplace").decode()]
    subprocess.run(call, check=True, cwd=ROOT, env=os.environ | variables)
