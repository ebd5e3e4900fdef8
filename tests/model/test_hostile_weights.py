"""Files of weights that would cost memory or never end: refused, in one line."""

import io
import os
import zipfile
from pathlib import Path

from pipelines.errors import UserError
from pipelines.model.weights import read_weights_file

import pytest
import torch
from torchvision.models import resnet18, resnet152


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_weights_are_read_from_regular_files_only(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.pth"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is no regular file"):
        read_weights_file(Path("/dev/zero") if kind == "device" else path, "resnet18")


@pytest.mark.parametrize("head", [torch.zeros(1).expand(10**9, 512), torch.zeros(1000, 512, device="meta")])
def test_weights_without_all_of_their_values_are_refused(tmp_path: Path, head: torch.Tensor) -> None:
    state = resnet18().state_dict() | {"fc.weight": head, "fc.bias": torch.zeros(1).expand(len(head))}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="without all of its values"):
        read_weights_file(tmp_path / "weights.pth", "resnet18")


def packed_names(names: bytes) -> bytes:
    file, start = io.BytesIO(), io.BytesIO()
    torch.save({}, start)
    with zipfile.ZipFile(start) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            target.writestr(name, names if name.endswith("data.pkl") else source.read(name))
    return file.getvalue()


@pytest.mark.parametrize("part", [b"}", b"(", b"N", b"K\x01", b"\x8a\0"])
@pytest.mark.parametrize("form", ["new", "old"])
def test_weights_of_megabytes_of_names_are_refused_unread(tmp_path: Path, monkeypatch, part: bytes, form: str) -> None:
    names = b"\x80\2" + part * (5_000_000 // len(part)) + b"."
    (tmp_path / "weights.pth").write_bytes(packed_names(names) if form == "new" else names)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UserError, match="more names than any network has"):
        read_weights_file(tmp_path / "weights.pth", "resnet18")


def test_weights_of_before_pytorch_1_6_are_read(tmp_path: Path) -> None:
    state = resnet152().state_dict()
    torch.save(state, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    assert read_weights_file(tmp_path / "weights.pth", "resnet152").state.keys() == state.keys()
