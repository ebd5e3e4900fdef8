"""Where the cache is, and that nobody else can write to it."""

import os
import stat
from pathlib import Path

from pipelines import cache
from pipelines.errors import MachineError

import pytest


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DALITUNE_CACHE", "~/new/cache")
    assert cache.cache_folder() == tmp_path / "new" / "cache"
    assert list((tmp_path / "new" / "cache").iterdir()) == []

    monkeypatch.setenv("DALITUNE_CACHE", "")
    monkeypatch.setattr(cache.platformdirs, "user_cache_path", lambda name: tmp_path / f"{name} default")
    assert cache.cache_folder() == tmp_path / "dalitune default"
    assert (tmp_path / "dalitune default").is_dir()

    (tmp_path / "file").touch()
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match=r"file cannot be written to .*set the variable DALITUNE_CACHE") as caught:
        cache.cache_folder()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="the owner of a folder is told by its number")
def test_a_cache_in_the_temporary_folder_is_nobody_elses(tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("DALITUNE_CACHE", raising=False)
    monkeypatch.setattr(cache.platformdirs, "user_cache_path", lambda name: tmp_path / "file")
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cache, "_stand_in_for", cache._stand_in_for.__wrapped__)  # each time as in a new process
    usual = tmp_path / f"dalitune-{os.getuid()}"

    assert cache.cache_folder() == usual
    assert stat.S_IMODE(usual.stat().st_mode) == 0o700
    assert cache.cache_folder() == usual
    assert str(usual) in capfd.readouterr().err

    def is_another_one() -> bool:
        folder = cache.cache_folder()
        return folder not in (usual, usual.resolve()) and stat.S_IMODE(folder.stat().st_mode) == 0o700

    usual.chmod(0o777)
    assert is_another_one()
    usual.chmod(0o700)
    with monkeypatch.context() as context:
        context.setattr(cache.os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
        foreign = tmp_path / f"dalitune-{os.stat(tmp_path).st_uid + 1}"
        foreign.mkdir(mode=0o700)
        folder = cache.cache_folder()
        assert folder != foreign
        assert folder.name.startswith(foreign.name)
    usual.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    usual.symlink_to(tmp_path / "elsewhere")
    assert is_another_one()
    assert list((tmp_path / "elsewhere").iterdir()) == []
