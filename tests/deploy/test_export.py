"""What leaves the project: the ONNX graph, the tensors and the model card, each used as its reader would."""

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy import export, predict, serve
from pipelines.config import Config
from pipelines.data.decode import _UPRIGHT, pixels_of_file, view_of_file
from pipelines.data.headers import exif_orientation
from pipelines.data.preprocess import Preprocess
from pipelines.errors import UserError
from pipelines.inference import Answer, PictureClassifier, ViewClassifier, answer_of, open_onnx, open_run
from pipelines.model.weights import read_run_weights
from pipelines.run_files import read_description
from tests.helpers.corpus import encoded, exif, picture
from tests.helpers.run_files import DESCRIPTION

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def test_onnx_gives_evaluates_class_for_every_validation_photo(exported_run):
    model = open_onnx(exported_run.folder / "export" / "model.onnx", threads=2)
    assert isinstance(model, PictureClassifier)
    photos = list(exported_run.evaluated)
    for answer, (name, confidence) in zip(model.classify(photos), exported_run.evaluated.values(), strict=True):
        best, share = answer.ranking(model.classes)[0]
        assert (best, answer.error) == (name, "")
        assert share == pytest.approx(confidence, abs=0.02)


def test_the_graph_takes_batches_of_uint8_pictures(exported_run):
    file = exported_run.folder / "export" / "model.onnx"
    session = onnxruntime.InferenceSession(file)
    (taken,) = session.get_inputs()
    assert (taken.name, taken.type, taken.shape[-1], len(taken.shape)) == ("pictures", "tensor(uint8)", 3, 4)
    pictures = np.stack([np.asarray(picture(300, 401, seed)) for seed in range(3)])
    together = session.run(["logits"], {"pictures": pictures})[0]
    alone = [session.run(["logits"], {"pictures": one[None]})[0][0] for one in pictures]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-5)
    assert len(np.unique(together[:, 0])) == 3
    assert b"site-packages" not in file.read_bytes()  # no trace of the machine


@pytest.mark.parametrize(("crop_mode", "resize"), [("center", 72), ("center", 64), ("squash", 72)])
def test_the_graphs_pixels_are_the_engines(crop_mode, resize, tmp_path):
    chosen = Preprocess(resize, 64, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), crop_mode=crop_mode)
    text = export._preprocess_text(chosen, 18)
    session = onnxruntime.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
    files = {f"{height} x {width}": encoded("PNG", photo=picture(height, width)) for height, width in SIZES}
    files |= {f"exif {turn}": encoded(exif=exif(turn)) for turn in range(1, 9)}
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with Image.open(path) as photo:
            orientation = exif_orientation(photo)
            upright = photo.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else photo
            pixels = session.run(None, {"pictures": np.asarray(upright.convert("RGB"))[None]})[0][0]
        difference = np.abs(pixels.transpose(1, 2, 0) - view_of_file(str(path), chosen))
        assert difference.max() <= 2, name
        assert difference.mean() < 0.3, name  # grey levels; a shift by a pixel makes 10


SIZES = [(72, 72), (72, 73), (73, 72), (64, 400), (401, 64), (30, 20), (1, 1), (145, 143), (700, 1000), (999, 333)]


def test_the_tensors_are_those_of_best_pt(exported_run):
    state = torch.load(exported_run.folder / "best.pt", weights_only=True)
    with safe_open(exported_run.folder / "export" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in state.items())
        facts = file.metadata()
    description = json.loads((exported_run.folder / "model.json").read_text())
    assert json.loads(facts["classes"]) == description["classes"]
    preprocess = json.loads(facts["preprocess"])
    assert preprocess == {
        key: description[key] for key in ("resize", "crop_mode", "image_size", "mean", "std", "transparency", "shrink")
    }


def test_the_cards_own_code_runs(exported_run, tmp_path, monkeypatch, capsys):
    folder = exported_run.folder / "export"
    card = (folder / "README.md").read_text()
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    photo, (name, _) = max(exported_run.evaluated.items(), key=lambda item: item[1][1])
    shutil.copy(photo, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    *code, of_the_graph = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec("\n".join([*code, of_the_graph]), {})
    assert capsys.readouterr().out.split() == [name, name]

    clear = picture(90, 120).convert("RGBA")
    clear.putalpha(picture(90, 120, 7).convert("L"))
    clear.save(tmp_path / "clear.png")
    names: dict[str, Any] = {}
    exec("\n".join(code).replace("photo.jpg", "clear.png"), names)
    (answer,) = open_run(exported_run.folder, torch.device("cpu")).classify([str(tmp_path / "clear.png")])
    np.testing.assert_allclose(names["logits"][0], answer.logits, rtol=0, atol=0.02)


def test_any_class_name_survives_the_cards_code():
    names = ["👩‍🌾", 'a "bee\'s"', "back\\slash", "{brace}", "Käfer", "蚂蚁"]
    description = DESCRIPTION | {"classes": names, "scores": {}, "data": None}
    preprocess = Preprocess(resize=256, image_size=224, mean=(0, 0, 0), std=(1, 1, 1))
    model = PictureClassifier(tuple(names), preprocess, lambda pictures: pictures)
    facts = export._facts(Path("run"), description, None, None, model)
    assert ast.literal_eval(facts["class_list"]) == names


def test_the_card_is_filled_from_the_run(exported_run):
    folder = exported_run.folder / "export"
    card = (folder / "README.md").read_text()
    description = json.loads((exported_run.folder / "model.json").read_text())
    scores = description["scores"]
    assert f"{scores['correct']} of {scores['count']}" in card
    assert "95 % interval" in card
    assert description["dataset_fingerprint"] in card
    assert 'mode: "feature_extract"' in card
    assert not re.search(r"[{}]", card.partition("```python")[0])  # nothing left to fill in
    assert str(exported_run.folder.parent) not in card
    assert description["data"] not in card
    with Image.open(folder / "confusion_matrix.png") as matrix:
        assert matrix.width > 100
    assert sorted(file.name for file in folder.iterdir()) == [
        *("README.md", "confusion_matrix.png", "model.onnx", "model.safetensors")
    ]
    assert not list(exported_run.folder.glob(".export-*"))


def test_a_card_names_no_folder_of_this_machine():
    recipe = export._recipe(Config(weights="/home/me/w.pth", teacher="/home/me/runs/large"))
    assert ('weights: "w.pth"' in recipe, 'teacher: "large"' in recipe, "/home" in recipe) == (True, True, False)


@pytest.fixture
def copied_run(exported_run, tmp_path) -> Path:
    """The run without its export and without its photos."""
    folder = tmp_path / "run"
    shutil.copytree(exported_run.folder, folder, ignore=shutil.ignore_patterns("export", "figures"))
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description | {"data": "/nowhere/photos"}))
    return folder


@pytest.fixture(scope="module")
def network_graph(exported_run):
    """PyTorch's exporter takes seconds, and the copies have the same weights."""
    description = read_description(exported_run.folder, "run")
    return export._network_graph(description, read_run_weights(exported_run.folder, description["arch"], "run"))


def test_elsewhere_photos_are_given(copied_run, exported_run, network_graph, run_here, monkeypatch):
    monkeypatch.setattr(export, "_network_graph", lambda *_: network_graph)
    done = run_here(export, copied_run)
    assert done.returncode == 2
    assert "validation photos are not on this machine: give some with --photos FOLDER" in done.stderr
    photos = list(exported_run.evaluated)[:2]
    (copied_run / "export").mkdir()
    (copied_run / "export" / "confusion_matrix.png").write_bytes(b"an earlier export's, of other photos")
    done = run_here(export, copied_run, "--photos", *photos, copied_run / "model.json")
    assert done.returncode == 0, done.stderr
    assert "the same top-1 as PyTorch on 2 of 2 photos" in done.stdout
    assert "not checked" in done.stderr
    card = (copied_run / "export" / "README.md").read_text()
    assert "confusion_matrix.png" not in card
    assert not (copied_run / "export" / "confusion_matrix.png").exists()


@pytest.mark.parametrize("ties", [1, 2])
def test_a_photo_near_a_tie_moves_the_preprocessing_out_of_the_graph(
    copied_run, exported_run, network_graph, run_here, monkeypatch, ties
):
    compare, calls = export.compare, []

    def stand_in_that_finds_a_tie(*given):
        calls.append(given)
        check = compare(*given)
        return export.Check(check.count, ["tie.jpg"] * (len(calls) <= ties), check.largest, check.predicted)

    monkeypatch.setattr(export, "compare", stand_in_that_finds_a_tie)
    monkeypatch.setattr(export, "_network_graph", lambda *_: network_graph)
    photos = list(exported_run.evaluated)[:3]
    done = run_here(export, copied_run, "--photos", *photos)
    if ties == 2:
        assert done.returncode == 3
        assert "onnxruntime does not find PyTorch's class in 1 photo (tie.jpg" in done.stderr
        assert "--tolerance 0.34 takes the graph from normalised all the same" in done.stderr
        assert not (copied_run / "export").exists()
        assert not list(copied_run.glob(".export-*"))
        return
    assert done.returncode == 0, done.stderr
    model = open_onnx(copied_run / "export" / "model.onnx")
    assert isinstance(model, ViewClassifier)
    reference = open_run(copied_run, CPU)
    assert (model.classes, model.preprocess) == (reference.classes, reference.preprocess)
    for ours, theirs in zip(reference.classify(photos), model.classify(photos), strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-3, atol=1e-4)
    assert '"normalised": preprocess(photo)[None].numpy()' in (copied_run / "export" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "graph"),
    [
        (["--tolerance", "0.34"], "pictures"),
        (["--graph", "pictures", "--tolerance", "0.34"], "pictures"),
        (["--graph", "normalised", "--tolerance", "0.4"], "normalised"),
        (["--graph", "pictures"], None),
    ],
)
def test_flags_choose_the_graph_and_its_tolerance_for_near_ties(
    copied_run, exported_run, network_graph, run_here, monkeypatch, flags, graph
):
    compare = export.compare

    def stand_in_that_finds_a_tie(*given):
        check = compare(*given)
        return export.Check(check.count, ["tie.jpg"], check.largest, check.predicted, 0.01)

    monkeypatch.setattr(export, "compare", stand_in_that_finds_a_tie)
    monkeypatch.setattr(export, "_network_graph", lambda *_: network_graph)
    done = run_here(export, copied_run, *flags, "--photos", *list(exported_run.evaluated)[:3])
    if graph is None:
        assert done.returncode == 3
        assert "--tolerance 0.34 takes the graph from pictures all the same" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "the same top-1 as PyTorch on 2 of 3 photos" in done.stdout
    assert "differ, in confidence by 0.01 at most: tie.jpg" in done.stdout
    (taken,) = onnxruntime.InferenceSession(copied_run / "export" / "model.onnx").get_inputs()
    assert taken.name == graph
    assert "the same top-1 as PyTorch on 2 of 3 photos" in (copied_run / "export" / "README.md").read_text()


def test_another_opset_and_its_bounds(copied_run, exported_run, run_here):
    photo = next(iter(exported_run.evaluated))
    done = run_here(export, copied_run, "--opset", 20, "--photos", photo)
    assert done.returncode == 0, done.stderr
    assert onnx.load(copied_run / "export" / "model.onnx").opset_import[0].version == 20
    assert "opset 20" in (copied_run / "export" / "README.md").read_text()
    for flags in (["--opset", 17], ["--opset", 999], ["--tolerance", 2], ["--tolerance", "nan"]):
        done = run_here(export, copied_run, *flags, "--photos", photo)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), flags
        assert f"{flags[0]} {flags[1]}: " in done.stderr


def test_how_far_from_a_tie_a_differing_photo_was():
    class StandIn:
        def __init__(self, *logits):
            self.logits = [np.array(row, np.float32) for row in logits]

        def classify(self, paths):
            return map(Answer, paths, self.logits)

    check = export.compare(StandIn([0, np.log(3)], [1, 0]), StandIn([1, 0], [1, 0]), ["a", "b"])
    assert (check.count, check.differing, check.largest) == (2, ["a"], pytest.approx(1.0986, abs=1e-3))
    assert check.margin == pytest.approx(0.5)
    assert [export._rounded_up(share) for share in (1 / 3, 0.02, 1e-4, 1.0)] == [0.34, 0.02, 1e-4, 1.0]


def test_a_file_that_is_no_export_is_refused(tmp_path):
    file = tmp_path / "export" / "model.onnx"
    with pytest.raises(UserError, match=r"make it with `python deploy/export.py"):
        open_onnx(file)
    file.parent.mkdir()
    file.write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"not a model that deploy/export\.py made"):
        open_onnx(file)


def test_a_strip_that_would_fill_the_memory_is_refused(exported_run, tmp_path):
    strip = tmp_path / "strip.png"
    strip.write_bytes(encoded("PNG", photo=picture(1, 20_000)))
    (answer,) = open_onnx(exported_run.folder / "export" / "model.onnx").classify([str(strip)])
    assert (answer.logits, answer.error) == (None, "too long and narrow for the ONNX graph")


@pytest.fixture(scope="module")
def mirrored_run(trained_run, answers_of_evaluate, tmp_path_factory):
    """The same weights of a run with test_flips and a temperature."""
    folder = tmp_path_factory.mktemp("runs") / "mirrored"
    shutil.copytree(trained_run.folder, folder, ignore=shutil.ignore_patterns("export", "figures"))
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description | {"test_flips": True, "temperature": 1.5}))
    return replace(trained_run, folder=folder, evaluated=answers_of_evaluate(folder))


def test_with_test_flips_and_a_temperature_each_way_gives_evaluates_answer(
    mirrored_run, trained_run, answers_of_evaluate, run_here, tmp_path, monkeypatch
):
    photos, file = list(mirrored_run.evaluated)[:10], tmp_path / "answers.jsonl"
    classes, confidences = zip(*(mirrored_run.evaluated[photo] for photo in photos), strict=True)
    of_one_view = answers_of_evaluate(mirrored_run.folder, "--test-flips=false")
    plain = [of_one_view[photo][1] for photo in photos]
    for flags, expected in (([], confidences), (["--test-flips", "False"], plain)):
        done = run_here(predict, mirrored_run.folder, *photos, "--cpu", "--json", file, *flags)
        assert done.returncode == 0, done.stderr
        assert ("each with its mirror image" in done.stderr) == (not flags)
        found = [json.loads(line)["confidence"] for line in file.read_text().splitlines()]
        assert found == pytest.approx(expected, abs=2e-6)
    page = open_run(mirrored_run.folder, CPU)
    answers = [answer_of(page, path, pixels_of_file(path, page.preprocess, whole=False)) for path in photos]
    own = [answer.logits for answer in open_run(trained_run.folder, CPU).classify(photos)]
    assert not np.allclose([answer.logits for answer in answers], own, atol=0.01)
    rankings = [answer.ranking(page.classes)[0] for answer in answers]
    assert tuple(name for name, _ in rankings) == classes
    assert [confidence for _, confidence in rankings] == pytest.approx(
        confidences, abs=0.02
    )  # Pillow reads for the page

    exported = mirrored_run.folder / "export"
    for graph in ("normalised", "pictures"):
        done = run_here(export, mirrored_run.folder, "--graph", graph, "--photos", *photos)
        assert done.returncode == 0, done.stderr
        assert "10 of 10 photos, each with its mirror image, largest difference of a logit" in done.stdout
        model = open_onnx(exported / "model.onnx")
        assert model.test_flips
        for ours, theirs in zip(answers, model.classify(photos), strict=True):
            np.testing.assert_allclose(ours.logits, theirs.logits, rtol=0, atol=1e-3 if graph == "normalised" else 0.1)
    card = (exported / "README.md").read_text()
    assert "An answer was the mean of the logits of a photo and of its mirror image." in card
    assert "Its logits are the mean of a picture's and its mirror image's" in card
    shutil.copy(photos[0], exported / "photo.jpg")
    monkeypatch.chdir(exported)
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec("\n".join(code[:2]), names)
    np.testing.assert_allclose(names["logits"][0], answers[0].logits, rtol=0, atol=0.1)
    with torch.inference_mode():
        view, model = names["view"], names["model"]
        assert torch.equal(names["logits"], (model(view) + model(view.flip(3))) / 2 / 1.5)

    for flag, told in (("false", "the graph was made otherwise: export.py --test-flips false"), ("true", "port 99999")):
        done = run_here(serve, mirrored_run.folder, "--weights", "onnx", "--test-flips", flag, "--port", "99999")
        assert done.returncode == 2
        assert told in done.stderr
