"""The config: defaults < recipe < flags, and one clear line for whatever is wrong."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines import config as config_module
from pipelines.config import GROUPS, SCHEMA, Config, dump_yaml, parse_config, settings_page
from pipelines.errors import UserError
from pipelines.model.weights import Weights
from pipelines.training.report import _schedule_report, head_report, without_effect, without_effect_by_auto
from tests.helpers.paths import ROOT

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = [path for path in RECIPES if path.stem != "sweep"]  # W&B's own format
KEYS = [field.name for field in dataclasses.fields(Config)]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture(autouse=True)
def _no_default_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plain defaults, so that no test here depends on the numbers in configs/finetune.yaml."""
    path = tmp_path / "default" / "finetune.yaml"
    path.parent.mkdir()
    path.write_text("{}")
    monkeypatch.setattr(config_module, "DEFAULT_RECIPE", path)


def parse(*argv: str) -> Config:
    return parse_config(list(argv))[0]


def fault(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(list(argv))
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    assert caught.value.exit_code == 2
    return message


# Where a value comes from


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(recipe: Callable[[str], str]) -> None:
    path = recipe("lr: 0.5\nepochs: 3\n")
    config, name = parse_config(["--config", path, "--lr", "0.25"])
    assert (config.lr, config.epochs, config.batch_size, name) == (0.25, 3, Config().batch_size, "recipe")


def test_without_config_the_recipe_is_finetune_beside_train_py(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_config([]) == (Config(), "finetune")
    monkeypatch.undo()
    assert parse_config([]) == parse_config(["--config", str(ROOT / "configs" / "finetune.yaml")])
    assert parse_config([]) != (Config(), "finetune")


def test_without_the_default_recipe_one_line_says_so(
    recipe: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = tmp_path / "configs" / "finetune.yaml"
    monkeypatch.setattr(config_module, "DEFAULT_RECIPE", missing)
    assert fault() == f"{missing}: the default recipe is missing: run from a clone of dalitune, or give --config FILE"
    assert parse("--config", recipe("lr: 0.5\n")).lr == 0.5


def test_a_config_is_frozen_and_has_no_impossible_values() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0  # type: ignore[misc]
    for wrong in ({"lr": -1}, {"lr": math.nan}, {"resize": 100}, {"learning_rate": 1}):
        with pytest.raises(ValidationError):
            Config(**wrong)


# How a flag may be written


@pytest.mark.parametrize(
    "argv",
    [
        ["--batch_size", "8"],
        ["--batch-size", "8"],
        ["--batch_size=8"],
        ["--batch-size=8"],
    ],
)
def test_underscore_dash_space_and_equals_are_the_same(argv: list[str]) -> None:
    assert parse(*argv).batch_size == 8


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "1", "yes", "on", None])
def test_words_that_mean_true(word: str | None) -> None:
    assert parse("--compile" if word is None else f"--compile={word}").compile is True


@pytest.mark.parametrize("word", ["false", "False", "0", "no", "OFF"])
def test_words_that_mean_false(word: str) -> None:
    assert parse("--channels-last", word).channels_last is False


def test_a_bare_boolean_leaves_the_next_flag_alone() -> None:
    config = parse("--overwrite", "--compile", "--epochs", "2")
    assert (config.overwrite, config.compile, config.epochs) == (True, True, 2)


@pytest.mark.parametrize("word", ["null", "None", "none", "~", ""])
@pytest.mark.parametrize("key", ["lr_body", "max_steps", "data", "run", "clip_grad_norm"])
def test_words_that_mean_null_undo_the_recipe(recipe: Callable[[str], str], key: str, word: str) -> None:
    path = recipe("lr_body: 1\nmax_steps: 1\ndata: shapes\nrun: a\nclip_grad_norm: 1\n")
    assert getattr(parse("--config", path), key) is not None
    assert getattr(parse("--config", path, f"--{key}={word}"), key) is None


def test_none_is_a_value_where_the_key_has_it() -> None:
    config = parse("--weights", "none", "--freeze", "none", "--tracker", "none")
    assert (config.weights, config.freeze, config.tracker) == ("none", "none", "none")
    assert parse("--weights", "null").weights is None


# How a value is read, the same from a recipe and from a flag


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "1e-3", 0.001),
        ("lr", "1", 1.0),
        ("warmup_epochs", "2", 2.0),
        ("run", "3", "3"),
        ("run", "010", "010"),
        ("run", "2026-01-01", "2026-01-01"),
        ("run", "1e3", "1e3"),
        ("run", "yes", "yes"),
        ("compile", "on", True),
        ("compile", "1", True),
        ("max_steps", "7", 7),
        ("data", "photos/of bees.csv", "photos/of bees.csv"),
    ],
)
def test_a_text_is_read_by_the_type_of_its_key(recipe: Callable[[str], str], key: str, text: str, value: Any) -> None:
    for config in (parse(f"--{key}", text), parse("--config", recipe(f"{key}: {text}\n"))):
        assert getattr(config, key) == value
        assert type(getattr(config, key)) is type(value)


def test_yaml_null_and_the_quoted_word(recipe: Callable[[str], str]) -> None:
    config = parse("--config", recipe('lr_body: null\nmax_steps: ~\ndata:\nrun: "null"\n'))
    assert (config.lr_body, config.max_steps, config.data, config.run) == (None, None, None, "null")


WRONG = [
    ("lr", "abc", "a finite number > 0"),
    ("lr", "true", "a finite number > 0"),
    ("lr", "nan", "a finite number > 0"),
    ("lr", "-0.1", "a finite number > 0"),
    ("lr", "0", "a finite number > 0"),
    ("lr_body", "inf", "a finite number > 0 or null"),
    ("warmup_epochs", "-inf", "a finite number >= 0"),
    ("weight_decay", ".nan", "a finite number >= 0"),
    ("epochs", "true", "an integer >= 0"),
    ("epochs", "2.5", "an integer >= 0"),
    ("epochs", "-1", "an integer >= 0"),
    ("epochs", "null", "an integer >= 0"),
    ("epochs", "9" * 5000, "an integer >= 0"),
    ("seed", "-1", "an integer >= 0"),
    ("image_size", "63", "an integer >= 64 and <= 1024"),
    ("image_size", "1025", "an integer >= 64 and <= 1024"),
    ("crop_scale_min", "0", "a finite number > 0 and <= 1"),
    ("crop_ratio_max", "0.75", "a finite number >= 1 and <= 10"),
    ("flip_probability", "1.1", "a finite number >= 0 and <= 1"),
    ("label_smoothing", "1", "a finite number >= 0 and < 1"),
    ("val_fraction", "1", "a finite number > 0 and < 1"),
    ("compile", "2", "true or false"),
    ("compile", "maybe", "true or false"),
    ("loader", "DALI", "auto, dali, nvimgcodec or pillow"),
    ("freeze", "layer4", "none, stem, layer1, layer2, layer3 or auto"),
    ("freeze", "null", "none, stem"),
    ("arch", "mobilenet_v3", "mobilenet_v2, mobilenet_v3_small, mobilenet_v3_large or one of 68 (docs/settings.md)"),
    ("arch", "squeezenet1_0", "one of 68 (docs/settings.md)"),
    ("step_epochs", "0", "an integer >= 1"),
    ("runs", '""', "text"),
    *[("run", name, "a name of letters") for name in (".", "..", ".a", "-a", "a/b", "a b", "é", "a" * 101)],
]


@pytest.mark.parametrize(("key", "text", "possible"), WRONG)
def test_a_wrong_value_is_named_with_key_origin_and_alternatives(
    recipe: Callable[[str], str], key: str, text: str, possible: str
) -> None:
    path = recipe(f"{key}: {text}\n")
    shown = "" if text in ("null", '""') else text[:70]
    for message, origin in (
        (fault(f"--{key}={text.strip(chr(34))}"), f"--{key}: "),
        (fault("--config", path), f"{path}: "),
    ):
        assert message.startswith(origin)
        assert f"{key} cannot be " in message
        assert shown in message
        assert possible in message
        assert len(message) < len(path) + 250


@pytest.mark.parametrize("name", ["a", "3", "_x", "resnet-18.v2_b", "A" * 100])
def test_plain_folder_names_are_runs(name: str) -> None:
    assert parse(f"--run={name}").run == name


def test_a_name_with_a_final_newline_is_no_run() -> None:
    assert "--run: run cannot be 'a\\n'" in fault("--run=a\n")


def test_a_list_or_a_mapping_is_no_value(recipe: Callable[[str], str]) -> None:
    assert "lr cannot be a list" in fault("--config", recipe("lr: [0.1, 0.2]\n"))
    assert "runs cannot be a mapping" in fault("--config", recipe("runs:\n  a: b\n"))


def test_a_wrong_value_in_a_recipe_is_an_error_even_under_a_flag(recipe: Callable[[str], str]) -> None:
    path = recipe("lr: abc\n")
    assert fault("--config", path, "--lr", "0.1").startswith(f"{path}: lr cannot be 'abc'")


# Flags that are wrong


def test_an_unknown_flag_is_told_with_the_nearest() -> None:
    assert "'--batchsize'" in fault("--batchsize", "3")
    assert "nearest is --batch_size" in fault("--batchsize", "3")
    assert "nearest is --batch_size" in fault("--bach-size=3")
    assert "nearest is --lr" in fault("-lr", "3")
    assert "nearest is --config;" in fault("--confg", "x.yaml")
    assert fault("--zzz").startswith("unknown flag '--zzz'; --help lists all"), "nothing is near"


def test_a_flag_is_not_abbreviated() -> None:
    assert "unknown flag '--epoch'; the nearest is --epochs" in fault("--epoch", "3")


@pytest.mark.parametrize(
    "argv",
    [
        ["--batch_size", "1", "--batch_size", "2"],
        ["--batch_size", "1", "--batch-size", "2"],
        ["--batch-size=1", "--lr", "1", "--batch_size=1"],
    ],
)
def test_a_flag_given_twice_is_refused(argv: list[str]) -> None:
    assert fault(*argv).startswith("--batch_size: given more than once")


def test_config_given_twice_is_refused(recipe: Callable[[str], str]) -> None:
    assert fault("--config", recipe(""), "--config", recipe("")).startswith("--config: given more than once")


def test_stray_words_and_missing_values_are_refused() -> None:
    assert fault("0.1").startswith("'0.1': belongs to no flag")
    assert fault("--epochs", "3", "4").startswith("'4': belongs to no flag")
    assert fault("--lr").startswith("--lr: expected one argument")
    assert fault("--lr", "--epochs", "3").startswith("--lr: expected one argument")
    assert "unknown flag '--a\\nb'" in fault("--a\nb")


@given(
    st.lists(
        st.sampled_from([*(f"--{key}" for key in KEYS), "--x", "-1", "a", "=", "--", "", "none", "\n"]), max_size=5
    )
)
def test_any_command_line_gives_a_config_or_one_line(argv: list[str]) -> None:
    try:
        told = dump_yaml(parse_config(argv)[0])
    except UserError as error:
        told = str(error)
    assert told.startswith("run: ") or len(told.splitlines()) == 1


# Recipes that are wrong


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- lr\n", "must hold lines of the form"),
        ("lr\n", "must hold lines of the form"),
        ("", "must hold lines of the form"),
        ("# only a comment\n", "must hold lines of the form"),
        ("lr: 0.1\nepochs: 3\nlr: 0.2\n", "'lr' stands twice"),
        ("runs:\n  a: 1\n  a: 2\n", "'a' stands twice"),
        ("lr: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
        ("lr: !mine 3\n", "could not determine a constructor for the tag"),
        ("lr: [1\n", "line 2"),
        ("lr: 1\n---\nlr: 2\n", "expected a single document"),
        ("lr: *nowhere\n", "undefined alias"),
        ("? [a]\n: 1\n", "unhashable key"),
        ("lr: 1\x00\n", "special characters are not allowed"),
        ("[" * 5000, "not a recipe"),
        ("lrr: 1\n", "unknown key 'lrr'; the nearest is lr"),
        ("batch-size: 1\n", "unknown key 'batch-size'; the nearest is batch_size"),
        ("config: x.yaml\n", "unknown key 'config'"),
        ("null: 1\n", "unknown key null"),
        ("<<: {lr: 1}\n", "unknown key '<<'"),
    ],
)
def test_a_broken_recipe_is_told_in_one_line_with_its_name(recipe: Callable[[str], str], text: str, told: str) -> None:
    path = recipe(text)
    message = fault("--config", path)
    assert message.startswith(path)
    assert told in message


def test_a_recipe_that_is_not_there_or_no_file_or_no_text(tmp_path: Path) -> None:
    assert fault("--config", str(tmp_path / "no.yaml")).startswith(
        f"--config {tmp_path / 'no.yaml'}: cannot be read (No "
    )
    assert "cannot be read (Is a directory)" in fault("--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"runs: \xe9\n")
    assert "not a recipe" in fault("--config", str(tmp_path / "latin.yaml"))


# Values that do not go together

GROWING = ["--first_image_size=160", "--grow_epochs=5"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--image_size", "320"], "resize 256 (the default) and image_size 320 (--image_size)"),
        (["--eval_size=288"], "resize 256 (the default) and eval_size 288 (--eval_size) do not go together"),
        (["--image_size=320", "--eval_size=256", "--shrink=300"], "shrink 300 (--shrink) and image_size 320 (--im"),
        (["--eval_size=288", "--resize=320", "--shrink=300"], "shrink 300 (--shrink) and resize 320 (--resize)"),
        (["--eval_size=256", "--crop_mode=squash", "--shrink=224"], "shrink 224 (--shrink) and eval_size 256 (--eval"),
        (["--first_image_size=128"], "first_image_size 128 (--first_image_size) and grow_epochs null (the default)"),
        (["--grow_epochs=3"], "first_image_size null (the default) and grow_epochs 3 (--grow_epochs)"),
        ([*GROWING, "--image_size=160"], "first_image_size must be below image_size"),
        ([*GROWING, "--epochs=5"], "grow_epochs 5 (--grow_epochs) and epochs 5 (--epochs) do not go together"),
        ([*GROWING, "--epochs=0", "--head_init=fitted"], "grow_epochs 5 (--grow_epochs) and epochs 0 (--epochs)"),
        ([*GROWING, "--views_per_photo=4"], "first_image_size 160 (--first_image_size) and views_per_photo 4 (--"),
        ([*GROWING, "--arch=vit_b_16"], "arch vit_b_16 (--arch) and first_image_size 160 (--first_image_size)"),
        (["--arch=vit_b_16", "--eval_size=256"], "arch vit_b_16 (--arch) and eval_size 256 (--eval_size)"),
        (["--warmup_epochs=2.5", "--epochs=2"], "warmup_epochs 2.5 (--warmup_epochs) and epochs 2 (--epochs)"),
        (["--epochs=0"], "epochs 0 (--epochs) and head_init uniform (the default)"),
        (["--epochs=0"], "do not go together: nothing would teach the head"),
        (["--weights=none", "--freeze=none", "--head_init=fitted"], "a head cannot be fitted to what a random network"),
        (["--weights=none", "--mode=feature_extract"], "a frozen random network learns nothing"),
        (
            ["--mixup_alpha=0.2", "--views_per_photo=4"],
            "mixup_alpha 0.2 (--mixup_alpha) and views_per_photo 4 (--",
        ),
        (["--augment=light", "--contrast=0.5"], "augment light (--augment) and contrast 0.5 (--contrast) do not go"),
        (["--cutmix_alpha=1", "--views_per_photo=4"], "features that are kept, mixed photos do not have"),
        (["--arch=vit_b_16", "--freeze=layer1"], "only a ResNet's stages can be told: give freeze none, or mode"),
        (["--arch=vit_b_16", "--layer_decay=0.5"], "arch vit_b_16 (--arch) and layer_decay 0.5 (--layer_decay) do not"),
        (["--arch=vit_b_16", "--image_size=192"], "arch vit_b_16 (--arch) and image_size 192 (--image_size)"),
        (["--arch=vit_b_16", "--unfreeze=gradual"], "only a ResNet's stages can be told: give unfreeze together"),
        (
            ["--drop_path=0.2"],
            "arch resnet18 (the default) and drop_path 0.2 (--drop_path) do not go together: only what",
        ),
        (["--arch=swin_t", "--drop_path=0.2", "--compile"], "what blocks are left out of is not compiled"),
        (["--freeze_epochs=5", "--epochs=5"], "the body would never be trained: give more epochs, or mode feature_"),
        (["--weights=none", "--freeze_epochs=1"], "weights none (--weights) and freeze_epochs 1 (--freeze_epochs)"),
        (["--weights=none", "--freeze=stem"], "a frozen random network learns nothing"),
        (["--weights=none", "--batchnorm=frozen"], "weights none (--weights) and batchnorm frozen (--batchnorm)"),
    ],
)
def test_contradictions_are_told_with_both_keys_and_their_origins(argv: list[str], told: str) -> None:
    assert told in fault(*argv)


def test_a_flag_can_contradict_a_recipe_and_settle_it(
    recipe: Callable[[str], str],
) -> None:
    path = recipe("image_size: 320\n")
    assert f"image_size 320 ({path})" in fault("--config", path)
    assert parse("--config", path, "--resize", "320").resize == 320


@pytest.mark.parametrize(
    "argv",
    [
        ["--image_size=256", "--resize=256"],
        GROWING,
        [*GROWING, "--views_per_photo=auto", "--epochs=auto"],
        [*GROWING, "--epochs=6", "--mode=feature_extract"],
        ["--eval_size=192", "--resize=192"],  # the training's square is no cut of resize
        ["--eval_size=256", "--crop_mode=squash", "--shrink=256"],
        ["--warmup_epochs=10", "--epochs=10"],
        ["--weights=none", "--batchnorm=train"],
        ["--weights=none", "--batchnorm=auto"],
        ["--mode=feature_extract", "--batchnorm=train"],
        ["--mode=feature_extract", "--freeze=layer3"],  # the whole body is frozen either way
        ["--freeze=layer3", "--batchnorm=sync"],
        ["--mode=feature_extract", "--arch=vit_b_16", "--layer_decay=0.5"],
        ["--schedule=step"],
        ["--augment=light", "--hue=0.1"],
        ["--augment=strong", "--contrast=0.5"],
    ],
)
def test_what_goes_together_passes(argv: list[str]) -> None:
    parse(*argv)


# What is written out


def test_a_dump_keeps_the_order_and_plain_yaml_reads_it() -> None:
    values = yaml.safe_load(dump_yaml(Config(lr=1e-7, run="3")))
    assert list(values) == KEYS
    assert values == dataclasses.asdict(Config(lr=1e-7, run="3"))


@given(
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    seed=st.integers(0, 2**32 - 1),
    data=st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    run=st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", fullmatch=True),
    overwrite=st.booleans(),
)
def test_a_dump_is_read_back_to_an_equal_config(tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(dump_yaml(Config(**values)), encoding="utf-8")
    assert parse("--config", str(path)) == Config(**values)


# Help, table and recipes tell everything


def test_every_key_has_a_group_and_a_help_text() -> None:
    assert [key for keys in GROUPS.values() for key in keys] == KEYS == list(SCHEMA)
    for key in KEYS:
        assert len(SCHEMA[key]["description"]) > 10, key


def test_help_shows_every_flag_with_default_and_possible_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        parse_config(["--lr", "wrong", "--help"])
    assert caught.value.code == 0
    sections = dict(re.findall(r"^(\w+):\n((?:  .*\n)+)", capsys.readouterr().out, re.MULTILINE))
    assert "--config FILE" in sections.pop("options")
    assert list(sections) == list(GROUPS)
    for group, keys in GROUPS.items():
        entries = [" ".join(entry.split()) for entry in re.split(r"^  --", sections[group], flags=re.MULTILINE)[1:]]
        assert [entry.split()[0] for entry in entries] == keys
        for key, entry in zip(keys, entries, strict=True):
            assert " ".join(SCHEMA[key]["description"].split()) in entry
            assert re.search(r"\[.+\] \(default \S+( finetune\.yaml: \S+)?\)$", entry), entry
    assert "[sgd or adamw] (default sgd)" in sections["Optimizer"]
    assert "[an integer >= 1 or null] (default null)" in sections["Training"]


def test_the_page_has_a_row_for_every_flag_below_its_group() -> None:
    tables = dict(zip(*[iter(re.split(r"^## (.+)\n", settings_page(), flags=re.MULTILINE)[1:])] * 2, strict=True))
    names = re.findall(r"`(\w+)`", tables.pop("Values of arch"))
    assert names == SCHEMA["arch"]["enum"]
    assert list(tables) == list(GROUPS)
    for group, keys in GROUPS.items():
        rows = re.findall(r"^\| `--(\w+)` \| `[^|`]+` \| (?:`[^|`]+`)? \| [^|]+ \|$", tables[group], re.MULTILINE)
        assert rows == keys
    assert "| `--lr` | `0.01` |  | learning rate of the head [a finite number > 0] |" in tables["Optimizer"]


def test_the_page_says_what_the_default_recipe_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text("epochs: auto\nlr: 0.01\n")
    monkeypatch.setattr(config_module, "DEFAULT_RECIPE", recipe)
    assert "| `--epochs` | `10` | `auto` |" in settings_page()
    assert "| `--lr` | `0.01` |  |" in settings_page(), "as by default"


def test_the_recipes_are_these() -> None:
    names = [
        "feature_extract",
        "finetune",
        "imagenet",
        "imagenet_ffcv",
        "quickstart",
        "tutorial_features",
        "tutorial_finetune",
    ]
    assert [path.stem for path in RECIPES] == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_comments_every_key_in_one_column(path: Path) -> None:
    config, name = parse_config(["--config", str(path)])
    assert name == path.stem
    text = path.read_text()
    header, _, body = text.partition("\n\n")
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(rf"accelerate launch .*train\.py --config configs/{path.name}", header)
    rows = [line for line in body.splitlines() if line]
    for row in rows:
        assert re.fullmatch(r"[a-z_]+: \S+ +# \S.+", row), row
    assert len({row.index("#") for row in rows}) == 1
    set_here = [row.partition(":")[0] for row in rows]
    assert set_here == sorted(set_here, key=KEYS.index)
    # Other readers of YAML should see the same values: no 1e-3, which they take for a string.
    assert {key: getattr(config, key) for key in set_here} == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("name", "mode"), [("tutorial_finetune", "finetune"), ("tutorial_features", "feature_extract")]
)
def test_the_tutorial_recipes_are_the_tutorial(name: str, mode: str) -> None:
    path = next(path for path in RECIPES if path.stem == name)
    tutorial: dict[str, Any] = {"image_size": 224, "resize": 256, "crop_scale_min": 0.08, "flip_probability": 0.5}
    tutorial |= {"arch": "resnet18", "mode": mode, "freeze": "none", "batchnorm": "train", "label_smoothing": 0.0}
    tutorial |= {"epochs": 10, "batch_size": 4, "optimizer": "sgd", "lr": 0.001, "lr_body": None, "momentum": 0.9}
    tutorial |= {"weight_decay": 0.0, "schedule": "step", "step_epochs": 5, "step_gamma": 0.1, "warmup_epochs": 0.0}
    tutorial |= {"clip_grad_norm": None, "data": None, "weights": None}
    assert dataclasses.asdict(parse("--config", str(path))) == dataclasses.asdict(Config(**tutorial))


def test_the_old_name_of_the_pillow_engine_is_taken(tmp_path):
    (tmp_path / "old.yaml").write_text("loader: torch\n")
    assert parse_config(["--config", str(tmp_path / "old.yaml")])[0].loader == "pillow"
    assert parse_config(["--loader=torch"])[0].loader == "pillow"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, None),
        ({"momentum": 0.5}, None),
        ({"optimizer": "adamw"}, None),  # momentum is as nobody has set it
        ({"optimizer": "adamw", "momentum": 0.5}, "momentum (optimizer: adamw)"),
        ({"optimizer": "adamw", "nesterov": True}, "nesterov (optimizer: adamw)"),
        ({"schedule": "step", "min_lr": 0.001}, "min_lr (schedule: step)"),
        ({"schedule": "constant", "min_lr": 0.001}, "min_lr (schedule: constant)"),
        ({"schedule": "one_cycle", "min_lr": 0.001}, None),
        ({"schedule": "one_cycle", "step_gamma": 0.5}, "step_gamma (schedule: one_cycle)"),
        ({"weight_decay_on": "matrices"}, "weight_decay_on (weight_decay: 0)"),
        ({"step_gamma": 0.5, "step_epochs": 2}, "step_epochs (schedule: cosine), step_gamma (schedule: cosine)"),
        ({"mode": "feature_extract", "lr_body": 0.1}, "lr_body (mode: feature_extract)"),
        ({"mode": "feature_extract", "layer_decay": 0.5}, "layer_decay (mode: feature_extract)"),
        ({"freeze": "layer3", "layer_decay": 0.5}, "layer_decay (freeze: layer3)"),
        ({"freeze": "layer2", "layer_decay": 0.5}, None),
        ({"unfreeze": "gradual"}, "unfreeze (freeze_epochs: 0)"),
        ({"freeze": "layer3", "freeze_epochs": 1, "unfreeze": "gradual"}, "unfreeze (freeze: layer3)"),
        ({"mode": "feature_extract", "drop_path": 0.1}, "drop_path (mode: feature_extract)"),
        ({"mode": "feature_extract", "freeze_epochs": 1}, "freeze_epochs (mode: feature_extract)"),
        ({"epochs": 0, "head_init": "fitted", "layer_decay": 0.5}, "layer_decay (epochs: 0)"),
        ({"crop_mode": "squash", "resize": 300}, "resize (crop_mode: squash)"),
        ({"epochs": 0, "head_init": "fitted", "lr": 0.5}, "lr (epochs: 0)"),
        ({"teacher_weight": 0.5}, "teacher_weight (teacher: null)"),
        ({"epochs": 0, "head_init": "fitted", "teacher": "runs/a"}, "teacher (epochs: 0)"),
        ({"teacher": "runs/a", "teacher_weight": 1.0, "label_smoothing": 0.1}, "label_smoothing (teacher_weight: 1)"),
        (
            {"teacher": "runs/a", "teacher_weight": 1.0, "class_weights": "balanced"},
            "class_weights (teacher_weight: 1)",
        ),
        ({"teacher": "runs/a", "label_smoothing": 0.1, "class_weights": "balanced"}, None),
        ({"epochs": 0, "head_init": "fitted", "mixup_alpha": 0.2}, "mixup_alpha (epochs: 0)"),
        ({"epochs": 0, "head_init": "fitted", "augment": "strong"}, "augment (epochs: 0)"),
        ({"epochs": 0, "head_init": "fitted", "batchnorm": "train"}, "batchnorm (epochs: 0)"),
        ({"epochs": 0, "head_init": "fitted", "compile": True}, "compile (epochs: 0)"),
        ({"tracker": "mlflow", "project": "p", "tags": "a"}, "tags (tracker: mlflow)"),
        ({"tracker": "none", "group": "g", "project": "p"}, "project (tracker: none), group (tracker: none)"),
    ],
)
def test_what_plays_no_part_is_said(settings, line):
    assert without_effect(Config(**settings)) == ([f"without effect: {line}"] if line else [])


@pytest.mark.parametrize(("epochs", "is_said"), [(0, False), (7, True), (8, False)])
def test_a_schedule_whose_first_step_never_comes_is_said(epochs, is_said):
    config = Config(schedule="step", step_epochs=7, epochs=epochs, head_init="fitted" if not epochs else "uniform")
    line = "schedule: step lowers no rate within 7 epochs, as its first step comes after 7"
    assert _schedule_report(config) == ([line] if is_said else [])


def test_a_head_that_the_weights_bring_is_said_where_another_was_asked_for():
    weights = Weights(None, "runs/a")
    line = "head: the one of runs/a, for the same classes: head_init zeros plays no part"
    for has_own_head in (True, False):
        assert head_report(Config(head_init="zeros"), "", weights, has_own_head) == [line] * has_own_head


def test_folders_that_a_recipe_names_are_found_from_home(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = parse_config(["--config", recipe("runs: ~/runs\ncompare_to: ~/runs/a\n")])[0]
    assert (config.runs, config.compare_to) == (str(tmp_path / "runs"), str(tmp_path / "runs" / "a"))


def test_pythons_none_is_null_in_a_recipe_where_a_flag_says_so(recipe):
    config = parse_config(["--config", recipe("group: None\nteacher: none\nweights: none\nproject: nonesuch\n")])[0]
    assert (config.group, config.teacher, config.weights, config.project) == (None, None, "none", "nonesuch")


@pytest.mark.parametrize(("come_to", "is_idle"), [("layer3", True), ("none", False)])
def test_what_plays_no_part_by_what_auto_has_come_to_is_said(come_to, is_idle):
    auto = Config(freeze="auto", head_init="auto", layer_decay=0.5)
    resolved = dataclasses.replace(auto, freeze=come_to)
    line = "without effect: layer_decay (freeze: layer3)"
    assert without_effect_by_auto(auto, resolved) == ([line] if is_idle else [])
    assert without_effect_by_auto(resolved, resolved) == []  # it was said at the start
