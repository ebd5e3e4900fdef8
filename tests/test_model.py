"""What trains and what moves under every setting, which weights are taken, and which files are refused."""

import json
import os
import pickle
import shutil
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from pipelines import model
from pipelines.config import Arch, Config
from pipelines.errors import MachineError, UserError
from pipelines.files import file_digest
from pipelines.loader import IMAGENET_MEAN, IMAGENET_STD
from pipelines.model import (
    STAGES,
    TransferModel,
    Weights,
    average_batchnorm_statistics,
    batchnorms,
    build_model,
    head_name,
    parameter_counts,
    read_run_weights,
    read_state_dict,
    read_weights,
    resolve_batchnorm,
    restore_model,
)
from pipelines.optimizer import make_optimizer
from pipelines.runs import RunFolder

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import get_model, get_model_weights, resnet18

CLASSES = ("ant", "bee", "wasp")
FREEZES = {
    0: {"freeze": "none"},
    1: {"freeze": "stem"},
    2: {"freeze": "layer1"},
    3: {"freeze": "layer2"},
    4: {"freeze": "layer3"},
    5: {"mode": "feature_extract"},
}  # frozen stages -> settings


def plain_state(classes: int = 1000, seed: int = 0) -> dict[str, torch.Tensor]:
    """A resnet18 whose BatchNorm statistics are not the ones that a new network has."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = resnet18(num_classes=classes)
        for module in batchnorms(network):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.state_dict()


def light_state(classes: int = 1000) -> dict[str, torch.Tensor]:
    """A resnet18's state_dict that is a small file: one value in each tensor, another one in each."""
    with torch.device("meta"):
        state = resnet18(num_classes=classes).state_dict()
    values = torch.linspace(0.5, 1, len(state))
    return {
        name: value.to(like.dtype).expand(like.shape) for (name, like), value in zip(state.items(), values, strict=True)
    }


@pytest.fixture(scope="module")
def pretrained() -> Weights:
    return Weights(plain_state(), "pretrained")


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    """No network, whatever this machine has, and no weights from earlier downloads."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of its first use
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("DALITUNE_WEIGHTS", raising=False)


def images(count: int, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def frozen_names(frozen_stages: int) -> tuple[str, ...]:
    prefixes = {"stem": ("conv1.", "bn1.")}
    return tuple(prefix for stage in STAGES[:frozen_stages] for prefix in prefixes.get(stage, (f"{stage}.",)))


def snapshot(model: TransferModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


# What is trained, what is frozen


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
@pytest.mark.parametrize("frozen_stages", FREEZES)
def test_an_update_moves_what_is_trained_and_no_photo_moves_nothing(pretrained, frozen_stages, batchnorm):
    model = build_model(Config(batchnorm=batchnorm, **FREEZES[frozen_stages]), pretrained, CLASSES).train()
    frozen = frozen_names(frozen_stages)
    parameters = {name for name, _ in model.network.named_parameters()}
    trained = {name for name in parameters if not name.startswith(frozen or "nothing")}
    assert {name for name, value in model.network.named_parameters() if value.requires_grad} == trained

    before, batch = snapshot(model), images(3).requires_grad_(frozen_stages > 0)
    hidden = model.frozen_part(batch)
    assert hidden.grad_fn is None
    assert not hidden.requires_grad
    assert (hidden is batch) == (frozen_stages == 0)
    functional.cross_entropy(model(hidden), torch.tensor([0, 1, 2])).backward()
    torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1).step()

    assert all(value.grad is None for name, value in model.network.named_parameters() if name not in trained)
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    statistics = set(before) - parameters
    assert moved & parameters == trained
    assert moved & statistics == (statistics if batchnorm == "train" else set())
    assert model.frozen_part_is_fixed == (frozen_stages > 0 and batchnorm == "frozen")

    model.zero_grad()
    modes, before = [module.training for module in model.modules()], snapshot(model)
    logits = model(model.frozen_part(images(0)))
    functional.cross_entropy(logits, torch.empty(0, dtype=torch.int64), reduction="sum").backward()
    assert logits.shape == (0, 3)
    # Zero, and not missing: the other processes of a DDP run wait for it.
    assert all(not value.grad.any() for value in model.parameters() if value.requires_grad)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("frozen_stages", FREEZES)
def test_both_parts_together_are_torchvisions_network(pretrained, frozen_stages):
    model = build_model(Config(**FREEZES[frozen_stages]), pretrained, CLASSES).eval()
    with torch.no_grad():
        assert torch.equal(model(model.frozen_part(images(2))), model.network(images(2)))


OTHERS = {"mobilenet_v3_small": 64, "regnet_y_400mf": 64, "swin_t": 64, "vit_b_32": 224}  # -> pixels


@pytest.mark.parametrize(
    ("arch", "mode"),
    [
        ("mobilenet_v3_small", "finetune"),
        ("mobilenet_v3_small", "feature_extract"),
        ("regnet_y_400mf", "feature_extract"),
        ("swin_t", "finetune"),
        ("vit_b_32", "feature_extract"),
    ],
)
def test_a_network_without_stages_is_frozen_as_a_whole_or_not_at_all(arch, mode):
    config = Config(arch=arch, mode=mode, image_size=OTHERS[arch])
    state = get_model(arch, weights=None).state_dict()
    model = build_model(config, Weights(state, ""), CLASSES).train()
    has_batchnorm = bool(batchnorms(model))
    assert model.batchnorm == ("frozen" if has_batchnorm else "none")
    assert model.frozen_part_is_fixed == (mode == "feature_extract")
    assert model.dropout_is_left_out == (arch in ("mobilenet_v3_small", "swin_t"))
    head = {f"{model.head_name}.weight", f"{model.head_name}.bias"}
    parameters = {name for name, _ in model.network.named_parameters()}
    trained = {name for name, value in model.network.named_parameters() if value.requires_grad}
    assert trained == (parameters if mode == "finetune" else head)
    groups = [group["name"] for group in make_optimizer(model, config).param_groups]
    assert groups == (["head", "body"] if mode == "finetune" else ["head"])
    before, batch = snapshot(model), images(3, OTHERS[arch])
    assert all(torch.equal(before[name], state[name]) for name in state.keys() - head)
    hidden = model.frozen_part(batch)
    assert hidden.shape == ((3, model.head.in_features) if mode == "feature_extract" else batch.shape)
    logits = model(hidden)
    torch.testing.assert_close(logits, model.eval().network(batch))  # training drops nothing
    functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1).step()
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert head <= moved <= trained
    model.zero_grad()
    model.train()(model.frozen_part(images(0, OTHERS[arch]))).sum().backward()
    assert all(not value.grad.any() for value in model.parameters() if value.requires_grad)
    restored = restore_model(arch, Weights(model.network.state_dict(), "", CLASSES)).eval()
    torch.testing.assert_close(restored(batch), model.eval().network(batch))


def test_networks_by_name_are_torchvisions_with_imagenets_mean_and_a_linear_head():
    smallest = {arch[:4]: arch for arch in reversed(get_args(Arch))}.values()  # of each family
    for arch in get_args(Arch):
        transforms = get_model_weights(arch).DEFAULT.transforms()
        assert (transforms.mean, transforms.std) == ([*IMAGENET_MEAN], [*IMAGENET_STD])
        if arch in smallest:
            network = get_model(arch, weights=None, num_classes=3)
            head = network.get_submodule(head_name(network))
            assert (head.out_features, len(head.bias)) == (3, 3)


def test_train_mode_leaves_frozen_batchnorm_in_eval(pretrained):
    network = build_model(Config(), pretrained, CLASSES).network
    for batchnorm in ("frozen", "train"):
        model = TransferModel(network, frozen_stages=0, batchnorm=batchnorm).train()
        assert {module.training for module in batchnorms(model)} == {batchnorm == "train"}
        assert model.network.layer4[0].conv1.training
        assert not any(module.training for module in model.eval().modules())


def test_sync_in_one_process_is_plain_batchnorm(pretrained):
    """SyncBatchNorm runs on GPUs only, and one process has nobody to talk to."""
    model = build_model(Config(batchnorm="sync"), pretrained, CLASSES)
    assert model.batchnorm == "sync"
    assert {type(module) for module in batchnorms(model)} == {nn.BatchNorm2d}
    assert model.train()(images(0)).shape == (0, 3)
    assert model.network.bn1.running_mean.isfinite().all()


@pytest.mark.parametrize(
    ("setting", "state", "expected"),
    [("auto", {}, "frozen"), ("auto", None, "train"), ("train", {}, "train"), ("frozen", None, "frozen")],
)
def test_batchnorm_auto_is_frozen_with_weights_and_train_without(setting, state, expected):
    assert resolve_batchnorm(Config(batchnorm=setting), Weights(state, "")) == expected


def test_statistics_of_frozen_batchnorm_are_never_averaged(pretrained):
    """(x + x + x) / 3 is not always x, and there is no process group here: touching them would fail."""
    average_batchnorm_statistics(build_model(Config(), pretrained, CLASSES), world_size=3)


def test_parameter_counts(pretrained):
    assert parameter_counts(build_model(Config(mode="feature_extract"), pretrained, ("a", "b"))) == (11177538, 1026)
    assert parameter_counts(build_model(Config(), pretrained, ("a", "b"))) == (11177538, 11177538)


def test_channels_last_memory(pretrained):
    for wanted in (True, False):
        weight = build_model(Config(channels_last=wanted), pretrained, CLASSES).network.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == wanted


# The head


def test_the_head_is_drawn_from_the_seed_alone(pretrained):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    head = build_model(Config(seed=7), pretrained, CLASSES).network.fc
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = build_model(Config(seed=7), pretrained, CLASSES).network.fc
    assert torch.equal(head.weight, again.weight)
    assert torch.equal(head.bias, again.bias)
    other = build_model(Config(seed=8), pretrained, CLASSES).network.fc
    assert not torch.isclose(head.weight, other.weight).all(dim=1).any()
    # PyTorch's own range, filled evenly.
    bound = 512**-0.5
    assert 0.99 * bound < head.weight.max() <= bound
    assert -bound <= head.weight.min() < -0.99 * bound
    assert head.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_head_of_zeros_is_of_no_seed_and_a_runs_own_head_is_kept(pretrained):
    for seed in (1, 2):
        head = build_model(Config(head_init="zeros", seed=seed), pretrained, ("ant", "bee")).network.fc
        assert not head.weight.any()
        assert not head.bias.any()
    of_run = Weights(plain_state(2), "run", ("ant", "bee"))
    kept = build_model(Config(head_init="zeros"), of_run, ("ant", "bee")).network.fc
    assert torch.equal(kept.weight, of_run.state["fc.weight"])


def test_the_heads_first_weights_never_change(pretrained):
    """Golden values: a run of last year must begin with the same head."""
    head = build_model(Config(seed=0), pretrained, CLASSES).network.fc
    values = [*head.weight[0, :3].tolist(), head.weight[2, 511].item(), *head.bias.tolist()]
    golden = [0.038633302, 0.017791513, 0.007096863, -0.0016641546, 0.00027887908, 0.043966208, 0.021082517]
    assert values == pytest.approx(golden, abs=1e-8)


def test_random_weights_come_from_the_seed(pretrained):
    settings = {"weights": "none", "batchnorm": "train"}
    first, again, other = (
        build_model(Config(seed=seed, **settings), Weights(None, "random"), CLASSES).network for seed in (3, 3, 4)
    )
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_the_head_of_a_run_is_kept_where_its_classes_are_the_same(pretrained):
    weights = Weights(light_state(3), "run", CLASSES)
    kept = build_model(Config(), weights, CLASSES).network
    assert torch.equal(kept.fc.weight, weights.state["fc.weight"])
    assert torch.equal(kept.conv1.weight, weights.state["conv1.weight"])
    turned = build_model(Config(), weights, CLASSES[::-1]).network
    assert torch.equal(turned.conv1.weight, weights.state["conv1.weight"])
    assert torch.equal(turned.fc.weight, build_model(Config(), pretrained, CLASSES).network.fc.weight)


def test_restore_model_is_the_model_as_it_was_saved():
    state = plain_state(3)
    plain = resnet18(num_classes=3).eval()
    plain.load_state_dict(state)
    model = restore_model("resnet18", Weights(state, "run", CLASSES)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(model.frozen_part(images(2))), plain(images(2)), rtol=1e-4, atol=1e-4)


# Files


@pytest.mark.parametrize("sync", [False, True])
def test_best_weights_load_with_the_tutorials_three_lines(pretrained, tmp_path, sync):
    model = build_model(Config(), pretrained, CLASSES)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(model.network) if sync else model.network
    RunFolder(tmp_path).save_best(network, {})
    saved = torch.load(tmp_path / "best.pt", map_location="cpu", weights_only=True)
    assert list(saved) == list(resnet18().state_dict())
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in saved.values())

    m = resnet18()
    m.fc = nn.Linear(512, 3)
    m.load_state_dict(torch.load(tmp_path / "best.pt", map_location="cpu"))
    with torch.no_grad():
        expected = model.eval()(model.frozen_part(images(2)))
        torch.testing.assert_close(m.eval()(images(2)), expected, rtol=1e-4, atol=1e-4)


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
    "a list": (lambda path, state: torch.save([1, 2], path), "plain state_dict"),
    "a checkpoint": (lambda path, state: torch.save({"model": state, "epoch": 3}, path), "plain state_dict"),
    "numbers for names": (lambda path, state: torch.save({1: torch.ones(1)}, path), "plain state_dict"),
    "no head": (_without("fc.weight", "fc.bias"), "first difference: fc.bias"),
    "no first layer": (_without("conv1.weight"), "first difference: conv1.weight"),
    "more": (_with(extra=torch.ones(1)), "first difference: extra"),
    "a head that does not fit": (_with(**{"fc.weight": torch.ones(4, 512)}), "first difference: fc.weight"),
    "prefixes": (
        lambda path, state: torch.save({f"module.{name}": state[name] for name in state}, path),
        "not a resnet18 in torchvision's layout",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_is_no_state_dict_is_refused_in_one_line(tmp_path, kind):
    write, message = BAD_FILES[kind]
    write(tmp_path / "weights.pt", light_state())
    with pytest.raises(UserError, match=message) as caught:
        read_state_dict(tmp_path / "weights.pt", "resnet18")
    line = str(caught.value)
    assert line.startswith(f"weights: {tmp_path / 'weights.pt'} ")
    assert "\n" not in line
    assert len(line) < 500
    assert not (tmp_path / "mark").exists()


def test_another_architecture_is_refused(tmp_path):
    torch.save(light_state(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="is not a resnet50 in torchvision's layout"):
        read_state_dict(tmp_path / "weights.pt", "resnet50")


@pytest.mark.parametrize("kind", ["new", "old format", "no batch counts"])
def test_state_dicts_of_every_age_are_read(tmp_path, kind):
    state = light_state(5)
    if kind == "no batch counts":
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pt", _use_new_zipfile_serialization=kind != "old format")
    read = read_state_dict(tmp_path / "weights.pt", "resnet18")
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


def test_without_a_network_one_line_names_the_url_and_what_does_without(offline):
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


@pytest.fixture
def downloaded(tmp_path, offline, monkeypatch) -> Callable[[object], Path]:
    """downloaded(content): where torch.hub keeps its files lies a resnet18-f37072fd.pth, and its digest is right."""

    def put(content: object) -> Path:
        file = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, file)
        monkeypatch.setattr(model, "file_digest", lambda *_: "f37072fd" + "0" * 56)
        return file

    return put


def test_weights_that_torchvision_has_downloaded_need_no_network(downloaded):
    downloaded(light_state())
    weights = read_weights(Config())
    assert weights.source == "imagenet (resnet18-f37072fd.pth)"
    assert torch.equal(weights.state["conv1.weight"], light_state()["conv1.weight"])
    assert weights.classes is None


def test_a_file_under_the_name_of_torchvisions_is_read_like_any_other(tmp_path, downloaded, monkeypatch):
    downloaded(Opens(tmp_path / "mark"))
    with pytest.raises(UserError, match=r"resnet18-f37072fd.pth .* code, which is never run"):
        read_weights(Config())
    assert not (tmp_path / "mark").exists()
    downloaded({f"backbone.{name}": value for name, value in light_state().items()})
    with pytest.raises(UserError, match=r"is not a resnet18 in torchvision's layout"):
        read_weights(Config())
    monkeypatch.setattr(model, "file_digest", file_digest)
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
            read_state_dict(file, "resnet18")


def test_a_file_that_would_take_far_more_memory_than_it_has_bytes_is_not_opened(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    with pytest.raises(UserError, match="its content is packed"):
        read_state_dict(tmp_path / "packed.pt", "resnet18")


def test_a_pipe_has_no_digest(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        file_digest(tmp_path / "pipe")
