"""Which weights are taken, in whatever form people have them, and which files are refused."""

import argparse
import json
import os
import pickle
import shutil
import struct
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from pipelines.config import Config
from pipelines.errors import MachineError, UserError
from pipelines.files import file_digest
from pipelines.model import weights as weights_module
from pipelines.model.network import build_model, restore_model
from pipelines.model.weights import Weights, count_classes, read_run_weights, read_weights, read_weights_file

import pytest
import safetensors.torch
import torch
from torchvision.models import get_model, resnet18

CLASSES = ("ant", "bee", "wasp")


def light_state(classes: int = 1000) -> dict[str, torch.Tensor]:
    """A resnet18's state_dict that is a small file: one value in each tensor, another one in each."""
    with torch.device("meta"):
        state = resnet18(num_classes=classes).state_dict()
    values = torch.linspace(0.5, 1, len(state))
    return {
        name: value.to(like.dtype).expand(like.shape) for (name, like), value in zip(state.items(), values, strict=True)
    }


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    """No network, whatever this machine has, and no weights from earlier downloads."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of its first use
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("DALITUNE_WEIGHTS", raising=False)


class Opens:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def _truncated(path: Path, state: dict) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:10_000])


def _without(*names: str):
    return lambda path, state: torch.save({name: state[name] for name in state if name not in names}, path)


def _with(**values: object):
    return lambda path, state: torch.save(state | values, path)


def _safetensors(header: bytes, content: bytes = b"", length: int | None = None):
    """A file of that format, written by hand."""
    whole = struct.pack("<Q", len(header) if length is None else length) + header + content
    return lambda path, state: path.write_bytes(whole)


def _bomb() -> dict:
    """Two to the power of fifty names, were each way to a mapping another one; and one that holds itself."""
    part: dict = {}
    whole = part
    for _ in range(50):
        whole = {"a": whole, "b": whole}
    part["itself"] = whole
    return whole


BAD_FILES = {
    "missing": (lambda path, state: None, "does not exist"),
    "directory": (lambda path, state: path.mkdir(), "is no regular file"),
    "empty": (lambda path, state: path.touch(), "EOF|Ran out of input"),
    "text": (lambda path, state: path.write_text("ants and bees"), "holds tensors and nothing else"),
    "truncated": (_truncated, "holds tensors and nothing else"),
    "runs code": (lambda path, state: torch.save(Opens(path.with_name("mark")), path), "tensors and nothing else"),
    "runs code, plain pickle": (
        lambda path, state: path.write_bytes(pickle.dumps(Opens(path.with_name("mark")))),
        "tensors and nothing else",
    ),
    "a list": (lambda path, state: torch.save([1, 2], path), "does not hold a state_dict"),
    "numbers for names": (lambda path, state: torch.save({1: torch.ones(1)}, path), "does not hold a state_dict"),
    "no first layer": (_without("conv1.weight"), "first difference: conv1.weight"),
    "a deeper network": (_with(**{"layer1.2.conv1.weight": torch.ones(1)}), "first difference: layer1.2.conv1.weight"),
    "other names, on two lines": (lambda path, state: torch.save({"a\nconv1.weight": torch.ones(1)}, path), "layout"),
    "several": (
        lambda path, state: torch.save({"teacher": state, "student": state | {"bn1.bias": torch.ones(64)}}, path),
        "holds several resnet18, with 'teacher.', 'student.' in front",
    ),
    "a bomb of mappings": (lambda path, state: torch.save(_bomb(), path), "does not hold a state_dict"),
    "a float8": (_with(**{"bn1.bias": torch.ones(64).to(torch.float8_e4m3fn)}), "bn1.bias as torch.float8"),
    "safetensors, no header": (_safetensors(b""), "holds tensors and nothing else"),
    "safetensors, endless header": (_safetensors(b"{}", length=2**63), "holds tensors and nothing else"),
    "safetensors, no JSON": (_safetensors(b"{" * 100_000), "holds tensors and nothing else"),
    "safetensors, overlap": (
        _safetensors(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":'
            b"[2,6]}}",
            b"123456",
        ),
        "holds tensors and nothing else",
    ),
    "safetensors, more than there is": (
        _safetensors(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', b"1234"),
        "holds tensors and nothing else",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_is_no_state_dict_is_refused_in_one_line(tmp_path, kind):
    write, message = BAD_FILES[kind]
    write(tmp_path / "weights.pt", light_state())
    with pytest.raises(UserError, match=message) as caught:
        read_weights_file(tmp_path / "weights.pt", "resnet18")
    line = str(caught.value)
    assert line.startswith(f"weights: {tmp_path / 'weights.pt'} ")
    assert "\n" not in line
    assert len(line) < 500
    assert not (tmp_path / "mark").exists()


def test_another_architecture_is_refused(tmp_path):
    torch.save(light_state(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="is not a resnet50 in torchvision's layout"):
        read_weights_file(tmp_path / "weights.pt", "resnet50")


def in_front(front: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {front + name: value for name, value in state.items()}


BODY = {name: value for name, value in light_state().items() if not name.startswith("fc.")}
EMA = {name: value / 2 for name, value in light_state().items()}
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(1)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
HEAD = {"weight": torch.ones(7, 512), "bias": torch.zeros(7)}
FORMS = {
    "timm's": (light_state(), ""),
    "a checkpoint": ({"model": light_state(), "optimizer": OPTIMIZER, "epoch": 3}, "'model.' is taken off the names"),
    "with arguments": ({"model": light_state(), "args": argparse.Namespace(lr=0.1)}, "'model.' is taken off"),
    "lightning's": (
        {"epoch": 1, "state_dict": in_front("model._orig_mod.", light_state()), "optimizer_states": [OPTIMIZER]},
        "'state_dict.model._orig_mod.' is taken off",
    ),
    **{
        front: (in_front(front, light_state()), f"'{front}' is taken off")
        for front in ("module.", "_orig_mod.", "backbone.", "module.encoder.", "net.0.")
    },
    "without a head": (BODY, "it has no head"),
    "another head": (BODY | in_front("fc.0.", HEAD) | in_front("fc.2.", HEAD), "'fc.0.weight', 'fc.2.bias' and 1 more"),
    "a head of another width": (BODY | in_front("fc.", {"weight": torch.ones(7, 9), "bias": torch.ones(7)}), "no head"),
    "another name of the head": (BODY | in_front("head.", HEAD), "'head' is taken for the head, fc"),
    "beside the head": (light_state() | in_front("projector.", HEAD), "left out: 'projector.bias', 'projector.weight'"),
    "averages": (
        {"model": in_front("module.", light_state()), "model_ema": in_front("module.", EMA) | {"n": torch.tensor(3)}},
        "'model_ema.module.' is taken off the names; these are averages (EMA), and 'model.module.' is passed over",
    ),
    "timm's averages": ({"state_dict": light_state(), "state_dict_ema": EMA}, "and 'state_dict.' is passed over"),
    "one module, two names": (in_front("a.", light_state()) | in_front("b.", light_state()), "'a.' is taken off"),
    "parameters": ({name: torch.nn.Parameter(value.float()) for name, value in light_state().items()}, ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_are_read_in_all_usual_forms(tmp_path, form):
    content, said = FORMS[form]
    torch.save(content, tmp_path / "weights.pt")
    weights = read_weights_file(tmp_path / "weights.pt", "resnet18")
    assert len(weights.notes) == bool(said)
    assert said in "".join(weights.notes)
    wanted = EMA if "averages" in form else light_state()
    for name in ("conv1.weight", "layer4.1.bn2.running_var"):
        assert torch.equal(weights.state[name], wanted[name])
    has_head = "fc.bias" in weights.state
    assert has_head == ("no head" not in "".join(weights.notes))
    assert count_classes(weights, "resnet18") == (0 if not has_head else 7 if "name of the head" in form else 1000)
    weights.digest()
    build_model(Config(), weights, CLASSES)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_safetensors_are_known_by_their_content_and_by_their_name(tmp_path, name):
    state = {name: value.contiguous() for name, value in in_front("module.", light_state(5)).items()}
    safetensors.torch.save_file(state, tmp_path / name, {"format": "pt"})
    weights = read_weights_file(tmp_path / name, "resnet18")
    assert weights.digest() == Weights(light_state(5), "").digest()
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:9000])
    with pytest.raises(UserError, match="is cut off, or not a file"):
        read_weights_file(tmp_path / name, "resnet18")


@pytest.mark.parametrize(
    ("arch", "old", "new"),
    [("densenet121", ".norm.1.", ".norm1."), ("vit_b_32", ".mlp.linear_2.", ".mlp.3."), ("swin_t", "no", "no")],
)
def test_older_layer_names_of_other_networks_are_read(tmp_path, arch, old, new):
    with torch.device("meta"):
        state = get_model(arch).state_dict()
    state = {name: torch.zeros((), dtype=like.dtype).expand(like.shape) for name, like in state.items()}
    torch.save({name.replace(new, old): value for name, value in state.items()}, tmp_path / "weights.pt")
    weights = read_weights_file(tmp_path / "weights.pt", arch)
    assert not weights.notes
    assert weights.state.keys() == state.keys()
    assert count_classes(weights, arch) == 1000


def test_a_file_cannot_replace_a_networks_table_of_indices(tmp_path):
    state = get_model("swin_t").state_dict()
    table = next(name for name in state if name.endswith("relative_position_index"))
    torch.save(state | {table: state[table] + 10**9}, tmp_path / "weights.pt")
    model = build_model(Config(arch="swin_t"), read_weights_file(tmp_path / "weights.pt", "swin_t"), CLASSES)
    assert torch.equal(model.network.state_dict()[table], state[table])


@pytest.mark.parametrize("kind", ["new", "old format", "no batch counts"])
def test_state_dicts_of_every_age_are_read(tmp_path, kind):
    state = light_state(5)
    if kind == "no batch counts":
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pt", _use_new_zipfile_serialization=kind != "old format")
    read = read_weights_file(tmp_path / "weights.pt", "resnet18").state
    assert all(torch.equal(read[name], state[name]) for name in state)
    model = restore_model("resnet18", Weights(read, "", tuple("abcde")))
    assert torch.equal(model.network.fc.bias, state["fc.bias"])


def write_run(folder: Path, classes: int = 3, **description: object) -> Path:
    folder.mkdir()
    torch.save(light_state(classes), folder / "best.pt")
    preprocessing = {"image_size": 64, "resize": 72, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    known = {"arch": "resnet18", "classes": list(CLASSES), **preprocessing, **description}
    (folder / "model.json").write_text(json.dumps(known))
    return folder


def test_weights_of_a_run_come_with_its_classes(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    for weights in (read_run_weights(run, "resnet18", "weights"), read_weights(Config(weights=str(run)))):
        assert weights.classes == CLASSES
        assert weights.source == str(run)
        assert torch.equal(weights.state["fc.weight"], light_state(3)["fc.weight"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_weights(Config(weights="~/run")).classes == CLASSES
    assert read_weights(Config(weights="~/run/best.pt")).classes is None


def test_a_folder_that_is_no_whole_run_is_refused(tmp_path):
    def refused(match: str, arch: str = "resnet18") -> None:
        with pytest.raises(UserError, match=match):
            read_run_weights(tmp_path / "run", arch, "weights")

    run = write_run(tmp_path / "run")
    refused("run holds a resnet18, not a resnet50: add --arch resnet18", "resnet50")
    for text in ("{", "[]", "{}", '{"arch": "resnet18", "classes": 3}'):
        (run / "model.json").write_text(text)
        refused("model.json is damaged")
    shutil.rmtree(run)
    (write_run(run) / "model.json").write_text((run / "model.json").read_text().replace(', "wasp"', ""))
    refused("best.pt has 3 classes and .*model.json 2")
    (run / "model.json").unlink()
    refused("not a run folder with best.pt and model.json")


# The setting `weights`


def test_the_variable_stands_in_for_the_default_of_resnet18_only(tmp_path, monkeypatch, offline):
    for name in ("variable.pt", "flag.pt"):
        torch.save(light_state(), tmp_path / name)
    monkeypatch.setenv("DALITUNE_WEIGHTS", str(tmp_path / "variable.pt"))
    assert read_weights(Config()).source == str(tmp_path / "variable.pt")
    assert read_weights(Config(weights=str(tmp_path / "flag.pt"))).source == str(tmp_path / "flag.pt")
    assert read_weights(Config(weights="none")) == Weights(None, "random")
    for settings in ({"arch": "resnet34"}, {"weights": "imagenet"}):
        with pytest.raises(MachineError, match="cannot fetch the ImageNet weights"):
            read_weights(Config(**settings))
    monkeypatch.setenv("DALITUNE_WEIGHTS", str(tmp_path / "gone.pt"))
    with pytest.raises(UserError, match=r"^DALITUNE_WEIGHTS: .*gone.pt does not exist"):
        read_weights(Config())


def test_without_a_network_one_line_names_the_url(offline):
    with pytest.raises(MachineError) as caught:
        read_weights(Config())
    line = str(caught.value)
    for part in (
        "https://download.pytorch.org/models/resnet18",
        "--weights FILE",
        "DALITUNE_WEIGHTS",
        "--weights none",
    ):
        assert part in line
    assert "\n" not in line
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("settings", "variable", "advice"),
    [
        ({"weights": "imagenet"}, "there.pt", 'no weights are named: give --weights "$DALITUNE_WEIGHTS", or'),
        ({"weights": "imagenet"}, "", "FILE, or --weights null and the variable DALITUNE_WEIGHTS, or --weights none"),
        ({"arch": "resnet34"}, "there.pt", "give a state_dict file with --weights FILE, or --weights none"),
    ],
)
def test_without_a_network_only_what_has_an_effect_is_advised(settings, variable, advice, offline, monkeypatch):
    monkeypatch.setenv("DALITUNE_WEIGHTS", variable)
    with pytest.raises(MachineError) as caught:
        read_weights(Config(**settings))
    assert advice in str(caught.value)


@pytest.fixture
def downloaded(tmp_path, offline, monkeypatch) -> Callable[[object], Path]:
    """downloaded(content): where torch.hub keeps its files lies a resnet18-f37072fd.pth, and its digest is right."""

    def put(content: object) -> Path:
        file = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, file)
        monkeypatch.setattr(weights_module, "file_digest", lambda *_: "f37072fd" + "0" * 56)
        return file

    return put


def test_weights_that_torchvision_has_downloaded_need_no_network(downloaded):
    downloaded(light_state())
    weights = read_weights(Config())
    assert weights.source == "imagenet (resnet18-f37072fd.pth)"
    assert not weights.notes
    (note,) = read_weights(Config(image_size=192)).notes
    assert note == "weights: torchvision tests them at 224 pixels: --image_size 224 --resize 256 for the same here"
    assert not read_weights(Config(image_size=192, eval_size=224)).notes
    assert torch.equal(weights.state["conv1.weight"], light_state()["conv1.weight"])
    assert weights.classes is None


def test_a_file_named_like_torchvisions_is_read_like_any_other(tmp_path, downloaded, monkeypatch):
    downloaded(Opens(tmp_path / "mark"))
    with pytest.raises(UserError, match=r"resnet18-f37072fd.pth .* code, which is never run"):
        read_weights(Config())
    assert not (tmp_path / "mark").exists()
    downloaded({f"stages.{name}": value for name, value in light_state().items() if name != "conv1.weight"})
    with pytest.raises(UserError, match=r"is not a resnet18 in torchvision's layout"):
        read_weights(Config())
    monkeypatch.setattr(weights_module, "file_digest", file_digest)
    with pytest.raises(UserError, match=r"cut off or not torchvision's \(its SHA-256 .*delete it"):
        read_weights(Config())


def test_weights_that_could_not_be_trained_from_are_refused(tmp_path):
    whole, file = light_state(), tmp_path / "weights.pt"
    for value, reason in (
        (torch.full((64,), torch.nan), "bn1.weight with values that are not finite"),
        (torch.ones(64, dtype=torch.int32), "bn1.weight as torch.int32"),
        (torch.ones(64).to_sparse(), "bn1.weight as torch.float32, torch.sparse_coo"),
    ):
        torch.save(whole | {"bn1.weight": value}, file)
        with pytest.raises(UserError, match=reason):
            read_weights_file(file, "resnet18")


def test_a_file_that_would_take_far_more_memory_is_not_opened(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    with pytest.raises(UserError, match="its content is packed"):
        read_weights_file(tmp_path / "packed.pt", "resnet18")


def test_a_pipe_has_no_digest(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        file_digest(tmp_path / "pipe")
