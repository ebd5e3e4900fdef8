"""The settings of a run: one frozen `Config`, made of defaults < YAML recipe (`--config`) < flags.

A setting stands once, as a field of `Config`: its type, range, default and help text. The flags, `--help`, the error
messages and docs/settings.md are derived from there; `python -m pipelines.config > docs/settings.md` renews the page.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import os
import re
import sys
import textwrap
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pipelines.errors import UserError
from pipelines.files import ROOT

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

# The format of the config.yaml in a run folder. It goes up when an older version would misread one. What a new setting
# means where a config.yaml does not name it yet: its default, or what run_files.py says.
FORMAT = 1
# Settings that are no more, each with its new name, or None where there is none: what is old is read, and that is said.
RETIRED: dict[str, str | None] = {}
_LARGEST_RECIPE = 1 << 16  # bytes
_PAGE_BEGINS = """\
# Settings

<!-- Made by `python -m pipelines.config > docs/settings.md`; a test fails where the page is not what that prints. -->

Every setting is a key of a recipe (`configs/*.yaml`) and a flag of `train.py`. A flag wins over the recipe, the recipe
over the default. A flag may be written with `-` for `_`, and as `--KEY=VALUE`; a yes-or-no flag without a value means
true. An unknown, doubled or impossible setting is one line on stderr and exit code 2. Without `--config` the recipe is
[configs/finetune.yaml](../configs/finetune.yaml): where its column has a value, that is what counts then, and the
default is what counts with a recipe that does not name the setting. Devices and precision are the launcher's
([distributed.md](distributed.md))."""
DEFAULT_RECIPE = ROOT / "configs" / "finetune.yaml"


def _without_nul(text: str) -> str:
    # A recipe can spell it. No path holds one, and no variable of the environment.
    if "\0" in text:
        raise ValueError("a NUL character")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
Folder = Annotated[Text, AfterValidator(os.path.expanduser)]  # as the shell does only where ~ begins a word
# Torchvision's networks whose last layer is linear and whose weights want ImageNet's mean and deviation.
Arch = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
    "alexnet", "convnext_tiny", "convnext_small", "convnext_base", "convnext_large",
    "densenet121", "densenet161", "densenet169", "densenet201",
    "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4", "efficientnet_b5",
    "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_s", "efficientnet_v2_m",
    "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
    "regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf", "regnet_x_8gf", "regnet_x_16gf",
    "regnet_x_32gf", "regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf", "regnet_y_8gf",
    "regnet_y_16gf", "regnet_y_32gf",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
    "swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b",
    "vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn",
    "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32",
]  # fmt: skip
UNSURE_FOR = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # accuracies that answers may be wanted to have
STAGED = ("resnet", "resnext", "wide_resnet")  # how those begin whose stages can be told
DROPS_PATHS = ("convnext", "efficientnet", "swin")  # those with torchvision's StochasticDepth
_MOST_NAMED = 12  # of a setting's values
ImageSize = Annotated[int, Field(ge=64, le=1024)]
Resize = Annotated[int, Field(ge=64, le=4096)]
Shrink = Annotated[int, Field(ge=64, le=8192)]
Freeze = Literal["none", "stem", "layer1", "layer2", "layer3", "auto"]
CropMode = Literal["center", "squash", "auto"]
Transparency = Literal["white", "black", "ignored"]


def engine_name(written: str) -> str:
    """The engine that is meant: until 0.2.0 the one of Pillow was called after PyTorch, and old recipes have that."""
    return "pillow" if written == "torch" else written


EngineName = Annotated[Literal["auto", "dali", "nvimgcodec", "pillow"], BeforeValidator(engine_name)]


_OF_EPOCHS = (
    *("batch_size", "max_batch_per_device", "max_steps", "crop_scale_min", "crop_ratio_max", "views_per_photo"),
    *("freeze", "freeze_epochs", "unfreeze", "lr", "lr_body", "layer_decay", "optimizer", "momentum", "nesterov"),
    *("weight_decay", "weight_decay_on", "clip_grad_norm", "schedule", "min_lr", "warmup_epochs", "ema_decay"),
    *("vertical_flip_probability", "quarter_turns", "brightness", "contrast", "saturation", "hue", "erase_probability"),
    *("rotation", "shear", "translation", "grey_probability", "blur_probability", "mixup_alpha", "cutmix_alpha"),
    *("label_smoothing", "dropout", "drop_path", "augment", "teacher", "teacher_weight", "teacher_temperature"),
    *("sampler", "patience", "batchnorm", "compile"),
)
# What augment light stands for: fastai's aug_transforms turn by up to 10 degrees and light by up to 0.2 as well.
LIGHT = {"rotation": 10.0, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
_OF_BODY = ("freeze", "freeze_epochs", "unfreeze", "lr_body", "layer_decay", "drop_path")
_OF_SCHEDULE = {"step_epochs": ("step",), "step_gamma": ("step",), "min_lr": ("cosine", "one_cycle")}


class Contradiction(ValueError):
    """Settings, named by `keys`, that are possible one by one but not together."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True))
class Config:
    """Every setting of a run. Building one from impossible values raises pydantic's `ValidationError`.

    The text below a field is its help text.
    """

    # pydantic's regular expressions are Rust's: $ is the very end, and a final newline does not pass.
    run: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")] = None
    """name of the run's folder; null: RECIPE-TIME-4 letters"""
    runs: Folder = "runs"
    """the folder that holds all runs"""
    overwrite: bool = False
    """start anew where a run of this name exists"""
    prepare: bool = False
    """fetch photos and weights, scan the photos, and end: for compute nodes without a network"""
    # 32 bits, so that a seed with something added to it still fits every generator's 64.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """decides order, crops, flips and the head's first weights"""
    deterministic: bool = False
    """ask PyTorch for the same bits every time, at some cost in speed"""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10
    """minutes from one checkpoint to the next; one is written at every epoch's end as well"""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """how many checkpoints stay, the last ones; pipelines.soup --last averages them"""

    data: Text | None = None
    """the photos: a folder ROOT/SPLIT/CLASS/*, a CSV path,label[,split] or `shapes`, a folder that is drawn here; null:
    DALITUNE_DATA, or else the ants-and-bees photos, downloaded once"""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """share set aside for validation; used only where there is no val split"""
    class_names: Literal["top", "path"] = "top"
    """what a class is in a folder of folders of folders: the first one in its split with all below it, or the path of
    each one that has photos"""
    skip_bad_files: bool = False
    """leave out files that cannot be read, instead of stopping"""
    cache_gb: Annotated[float, Field(ge=0, le=1e6)] = 4
    """most gigabytes of cached features, which are what frozen stages make of photos, for later runs on the same views,
    and as many of shrunk photos; the longest unused go first; 0: none are kept or looked for"""

    image_size: ImageSize = 224
    """side of the square that the model sees, in pixels"""
    first_image_size: ImageSize | None = None
    """side of a training photo's square in the first epoch, from which it grows by steps of 32 pixels to image_size;
    null: image_size in all epochs"""
    grow_epochs: Annotated[int | None, Field(ge=1)] = None
    """with first_image_size: epochs over which the square grows; those after them have image_size"""
    eval_size: ImageSize | None = None
    """side of that square in evaluations and wherever best.pt is used, and where a head is fitted; resize, at least as
    large, goes with it. As training crops show things larger than validation does, more than image_size often scores
    better (Touvron et al. 2019); null: image_size"""
    resize: Resize = 256
    """shorter side of a validation photo before its centre is cut out, in pixels"""
    shrink: Shrink | None = None
    """photos whose shorter side is larger, in pixels, are read from copies of this size, which are made once and kept
    in the cache folder: of phone photos, later epochs are read many times as fast with 512; null: photos are read as
    they lie"""
    crop_mode: CropMode = "center"
    """what validation sees of a photo: center, its central square; squash, all of it, squeezed into the square (resize
    plays no part then), with training crops squeezed alike; auto: squash where the median training photo is 1.75 times
    as long as wide or more, as the central square would be less than half of it"""
    transparency: Transparency = "white"
    """what transparent pixels are composed on; ignored: the colour that lies under them, often black"""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    """smallest area of a random training crop, as a share of the photo's: RandomResizedCrop's first scale"""
    crop_ratio_max: Annotated[float, Field(ge=1, le=10)] = 4 / 3
    """how many times as wide as high, and as high as wide, a training crop may be before it is made a square; 1: what
    is seen keeps its shape"""
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    """chance that a training photo is mirrored"""
    augment: Literal["none", "light", "strong"] = "none"
    """what is done to training photos besides the settings here: light, rotation 10, brightness, contrast and
    saturation 0.2, none of which may be set by hand as well; strong, to each photo one of the 14 operations of
    TrivialAugment (Mueller & Hutter 2021), as torchvision's TrivialAugmentWide has them"""
    vertical_flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """chance that a training photo is mirrored top to bottom, for photos without an up, as a microscope's"""
    quarter_turns: bool = False
    """turn training photos by 0, 90, 180 or 270 degrees, each as likely"""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """largest turn of a training photo to either side, in degrees; what comes in from outside is the mean colour"""
    shear: Annotated[float, Field(ge=0, le=60)] = 0.0
    """largest slant of its columns to either side, in degrees"""
    translation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """largest shift of it to each side, as a share of the square"""
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    """largest change of a training photo's brightness: a factor of 1 - this to 1 + this"""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    """of its contrast, likewise"""
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """of its saturation, likewise"""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """largest turn of its hues, of the whole circle"""
    grey_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """chance that a training photo loses its colours"""
    blur_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """chance that a training photo is blurred, by a Gaussian of 0.1 to 2 pixels where the square has 224 (Chen et al.
    2020)"""
    erase_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """chance that a box of a fiftieth to a third of a training photo is erased (Zhong et al. 2020)"""
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    """blend each training photo, and its label, with another one (Zhang et al. 2018), in shares drawn from Beta(this,
    this), as 0.2; 0: none; the training's top1 then counts an answer by the share of its class"""
    cutmix_alpha: Annotated[float, Field(ge=0)] = 0.0
    """cover a box of each training photo with another one (Yun et al. 2019), in shares likewise, as 1; with mixup_alpha
    each half of the photos"""
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    """which photos an epoch shows: shuffle, each once; balanced, as many of each class, so that those of small classes
    come several times and those of large ones in turn, over several epochs"""
    views_per_photo: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    """crops and flips that each training photo has, shown in turn, an epoch each; what frozen stages make of one is
    computed once, so that more epochs cost little; null: new ones every epoch; auto: 4 where stages are frozen, else
    null, and null beside sampler balanced, as what comes several times in an epoch would come as the same view, and
    where photos are mixed or their square grows"""

    loader: EngineName = "auto"
    """the engine that decodes; auto: DALI on an NVIDIA GPU, else nvImageCodec, each where it works; else Pillow"""
    loader_threads: Annotated[int | None, Field(ge=1)] = None
    """decoding threads of a process; null: chosen from the cores"""
    memory_gb: Annotated[float, Field(ge=0, le=1e6)] = 0
    """most gigabytes of a node in which photos stay decoded, so that later epochs decode the others only; 0: none do"""
    prefetch: Annotated[int, Field(ge=1, le=64)] = 2
    """micro-batches kept ready"""

    arch: Arch = "resnet18"
    """torchvision's network; of a ResNet, ResNeXt or Wide ResNet each stage can be frozen, of others the whole body"""
    weights: Literal["imagenet", "none"] | Text | None = None
    """first weights: `imagenet` through torchvision, `none` (random), a file with a state_dict or a finished run's
    folder; null: imagenet, or of a resnet18 the file DALITUNE_WEIGHTS, where that is set"""
    mode: Literal["finetune", "feature_extract"] = "finetune"
    """finetune trains body and head, feature_extract only the head"""
    freeze: Freeze = "none"
    """freeze the body of a ResNet up to and including this stage; auto, with head_init fitted or auto: layer3 where the
    fitted head is right on 0.95 of what its folds hold out, as more could win little, or photos are too few for folds;
    none everywhere else"""
    freeze_epochs: Annotated[int, Field(ge=0)] = 0
    """epochs, of all of them the first, in which the head alone is trained, as in fastai's fine_tune; then the body
    joins, but for what freeze leaves out; 0: it is trained from the start"""
    unfreeze: Literal["together", "gradual"] = "together"
    """how the body joins after freeze_epochs: together, or gradual, a ResNet's stages one by one, layer4 first, then
    another after each freeze_epochs more (Howard & Ruder 2018)"""
    batchnorm: Literal["auto", "frozen", "train", "sync"] = "auto"
    """BatchNorm's statistics; auto: frozen with pretrained weights, train from scratch"""
    head_init: Literal["uniform", "zeros", "fitted", "auto"] = "uniform"
    """first weights of a new head: uniform in +-1/sqrt(features), as PyTorch's own; zeros, with which all seeds begin
    alike (Kolesnikov et al. 2020); fitted before the training: logistic regression on what the body makes of the
    training photos as validation sees them, with flip_probability of their mirror images too (Kumar et al. 2022); auto:
    fitted and evaluated; then it stays, at 0.1 of lr and 0.3 of lr_body, where its folds make freeze auto layer3, and
    zeros where else some of the body is trained; with random weights zeros from the start"""
    channels_last: bool = True
    """keep tensors in channels-last memory"""
    compile: bool = False
    """run the model through torch.compile"""

    epochs: Literal["auto"] | Annotated[int, Field(ge=0)] = 10
    """how often every training photo is seen; 0 where a head is fitted: that is the whole training then; auto: 16, or 8
    where stages are frozen, and more where that would be fewer than 128 steps or than warmup_epochs, or would end
    before all joins that freeze_epochs keeps waiting"""
    max_steps: Annotated[int | None, Field(ge=1)] = None
    """end the run after this many steps, in the regular way"""
    patience: Annotated[int | None, Field(ge=1)] = None
    """end the run, in the regular way, after so many epochs without a better evaluation (best_by), that of a fitted
    head before the first epoch included; null: never"""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """photos of a step, over all processes together"""
    max_batch_per_device: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    """the most photos of one forward and backward pass on a device; a larger share of the batch is taken in several, by
    gradient accumulation; auto: as many as fit on the GPU; null: the whole share"""
    class_weights: Literal["none", "balanced"] = "none"
    """what a training photo weighs in the loss and in a fitted head; balanced: each class counts the same, however many
    photos it has"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the target that is spread over all classes"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """chance that an input of the head is left out in a step, for each photo anew (Srivastava et al. 2014)"""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """chance that what a network's last block adds to its input is left out in a step, for each photo anew, which falls
    to 0 at the first block (Huang et al. 2016); of a ConvNeXt, EfficientNet or Swin Transformer"""
    teacher: Text | None = None
    """folder of a finished run of the same classes, as of a larger network, whose answers to the very pixels that this
    one sees are learned beside the labels (Hinton et al. 2015); null: the labels alone"""
    teacher_weight: Annotated[float, Field(gt=0, le=1)] = 0.9
    """share of the teacher in the loss; the rest is the labels', which Hinton et al. weigh considerably less"""
    teacher_temperature: Annotated[float, Field(ge=1, le=100)] = 2.0
    """what the teacher's logits and the network's are divided by in the teacher's share of the loss: the higher, the
    more its small probabilities count"""
    clip_grad_norm: Annotated[float | None, Field(gt=0)] = None
    """largest norm that the gradient may have; null: any"""
    ema_decay: Annotated[float | None, Field(gt=0, lt=1)] = None
    """what a moving average of the weights keeps of itself in a step; it is evaluated beside them, and the better of
    the two may be best.pt, as model.json says; null: no average"""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """the update rule"""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """learning rate of the head"""
    lr_body: Annotated[float | None, Field(gt=0)] = None
    """learning rate of the body; null: that of the head"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """what the learning rate of a ResNet's stage is multiplied by in the stage before it, again and again from layer4,
    which has lr_body, to the stem (Bao et al. 2022), as 0.7; 1: all of the body has lr_body"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum"""
    nesterov: bool = False
    """Nesterov's momentum in SGD"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """an L2 penalty with sgd, decoupled decay with adamw (Loshchilov & Hutter 2019)"""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """what decays; matrices: what has two dimensions or more, and so neither biases nor the weights of normalisation
    (He et al. 2019)"""
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "cosine"
    """course of the learning rate after the warm-up; one_cycle: up from lr/25 along a cosine, and down along another,
    with the momentum as it is (Smith 2018)"""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """schedules cosine and one_cycle: the head's learning rate at the end, 0 meaning lr/250000 with one_cycle; the
    body's falls in proportion"""
    step_epochs: Annotated[int, Field(ge=1)] = 5
    """schedule step: epochs from one drop to the next"""
    step_gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """schedule step: what a drop multiplies the learning rate by"""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """epochs over which the learning rate rises to its full value; 0 with schedule one_cycle: 0.3 of epochs"""

    best_by: Literal["top1", "balanced"] = "top1"
    """which validation accuracy best.pt is the best of; balanced: the mean recall, so that each class counts the same
    however many photos it has"""
    test_flips: bool = False
    """the answer for a photo, in evaluations, predict.py, the page and the ONNX graph, is the mean of its logits and
    its mirror image's, which takes twice as long"""
    eval_batch_per_device: Annotated[int, Field(ge=1)] = 64
    """photos of a validation batch on one device"""

    log_every: Annotated[int, Field(ge=1)] = 50
    """steps per training row"""
    tracker: Literal[
        "wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "none"
    ] = "wandb"
    """where metrics go besides metrics.jsonl: one of Accelerate's trackers"""
    project: Text | None = None
    """the tracker's project, W&B's with or without `ENTITY/`; null: WANDB_PROJECT, or else dalitune"""
    tags: Text | None = None
    """W&B tags of the run, with commas between; null: WANDB_TAGS"""
    group: Text | None = None
    """W&B group of the run; null: WANDB_RUN_GROUP"""
    alerts: bool = False
    """have W&B send an alert when the run ends, fails or is stopped to be requeued"""
    log_model: Literal["never", "best", "end"] = "best"
    """when the best weights go to W&B: each time they improve, once at the end, or never"""
    compare_to: Folder | None = None
    """folder of another run: in the end it is said, and put into the tracker's summary, which of the two is better, by
    the photos that both have answered; null: none"""

    def without_effect(self) -> dict[str, str]:
        """The settings that play no part beside the others, each with the one that makes it so, as `key: value`."""
        # What the labels alone have in the loss; a head is fitted to them too.
        of_labels = ("label_smoothing",) if self.may_fit_head else ("label_smoothing", "class_weights")
        causes = {  # of two the later one counts
            "teacher_weight: 1": (self.teacher is not None and self.teacher_weight == 1, of_labels),
            "epochs: 0": (self.epochs == 0, (*_OF_EPOCHS, *(["image_size"] if self.eval_size else []))),
            "crop_mode: squash": (self.crop_mode == "squash", ("resize",)),
            "optimizer: adamw": (self.optimizer == "adamw", ("momentum", "nesterov")),
            "teacher: null": (self.teacher is None, ("teacher_weight", "teacher_temperature")),
            "weight_decay: 0": (self.weight_decay == 0, ("weight_decay_on",)),
            f"schedule: {self.schedule}": (True, [key for key, of in _OF_SCHEDULE.items() if self.schedule not in of]),
            f"tracker: {self.tracker}": (
                self.tracker != "wandb",
                (*(["project"] if self.tracker == "none" else []), "tags", "group", "log_model"),
            ),
            "freeze_epochs: 0": (self.freeze_epochs == 0, ("unfreeze",)),
            "freeze: layer3": (self.freeze == "layer3", ("layer_decay", "unfreeze")),
            "mode: feature_extract": (self.mode == "feature_extract", _OF_BODY),
        }
        return {key: cause for cause, (holds, keys) in causes.items() if holds for key in keys}

    @property
    def evaluation_size(self) -> int:
        """Side of the square that evaluations see, in pixels."""
        return self.eval_size or self.image_size

    @property
    def may_fit_head(self) -> bool:
        """Whether a head is fitted where nothing stands against it."""
        return self.head_init in ("fitted", "auto")

    @property
    def mixes_photos(self) -> bool:
        """Whether training photos are mixed with others."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def may_repeat_views(self) -> bool:
        """Whether views_per_photo may be a number: a mixed photo has no view of its own, nor one whose square grows."""
        return not self.mixes_photos and self.first_image_size is None

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        evaluated = "eval_size" if self.eval_size else "image_size"
        if self.resize < self.evaluation_size:
            raise Contradiction(f"resize must be at least {evaluated}", "resize", evaluated)
        for least in (evaluated if self.crop_mode == "squash" else "resize", "image_size"):
            if self.shrink is not None and self.shrink < getattr(self, least):
                raise Contradiction(f"shrink must be at least {least}", "shrink", least)
        if self.epochs != "auto" and self.warmup_epochs > self.epochs:
            raise Contradiction("warmup_epochs must be at most epochs", "warmup_epochs", "epochs")
        if self.sampler == "balanced" and self.class_weights == "balanced":
            raise Contradiction(
                "each makes all classes count the same, and both would favour small ones", "sampler", "class_weights"
            )
        for key, value in LIGHT.items():
            if self.augment == "light" and getattr(self, key):
                raise Contradiction(f"light sets it to {value:g}: give only one of the two", "augment", key)
        for key in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, key) and self.views_per_photo not in (None, "auto"):
                raise Contradiction(
                    "what few views are for, features that are kept, mixed photos do not have", key, "views_per_photo"
                )
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise Contradiction("Nesterov's momentum needs some", "nesterov", "momentum")
        if self.min_lr > self.lr:
            raise Contradiction("min_lr must be at most lr", "min_lr", "lr")
        if self.epochs == 0 and not self.may_fit_head:
            raise Contradiction("nothing would teach the head: give epochs, or head_init fitted", "epochs", "head_init")
        if self.weights == "none" and self.head_init == "fitted":
            raise Contradiction("a head cannot be fitted to what a random network sees", "weights", "head_init")
        if (self.first_image_size is None) != (self.grow_epochs is None):
            raise Contradiction("one needs the other", "first_image_size", "grow_epochs")
        if self.first_image_size is not None and self.first_image_size >= self.image_size:
            raise Contradiction("first_image_size must be below image_size", "first_image_size", "image_size")
        if self.grow_epochs is not None and self.epochs != "auto" and self.grow_epochs >= self.epochs:
            raise Contradiction("grow_epochs must be below epochs", "grow_epochs", "epochs")
        if self.first_image_size is not None and self.views_per_photo not in (None, "auto"):
            raise Contradiction(
                "what few views are for, features that are kept, are of one size", "first_image_size", "views_per_photo"
            )
        for key in ("image_size", "eval_size", "first_image_size"):
            if self.arch.startswith("vit_") and getattr(self, key) not in (None, 224):
                raise Contradiction("a vision transformer's weights are for 224 pixels", "arch", key)
        if self.mode == "finetune" and self.freeze not in ("none", "auto") and not self.arch.startswith(STAGED):
            raise Contradiction(
                "only a ResNet's stages can be told: give freeze none, or mode feature_extract", "arch", "freeze"
            )
        if self.mode == "finetune" and self.layer_decay < 1 and not self.arch.startswith(STAGED):
            raise Contradiction("only a ResNet's stages can be told: give layer_decay 1", "arch", "layer_decay")
        if self.mode == "finetune" and self.unfreeze == "gradual" and not self.arch.startswith(STAGED):
            raise Contradiction("only a ResNet's stages can be told: give unfreeze together", "arch", "unfreeze")
        if self.mode == "finetune" and self.epochs != "auto" and 0 < self.epochs <= self.freeze_epochs:
            raise Contradiction(
                "the body would never be trained: give more epochs, or mode feature_extract", "freeze_epochs", "epochs"
            )
        if self.mode == "finetune" and self.drop_path and not self.arch.startswith(DROPS_PATHS):
            raise Contradiction(
                "only what begins with convnext, efficientnet or swin has blocks to leave out", "arch", "drop_path"
            )
        if self.mode == "finetune" and self.drop_path and self.compile:
            raise Contradiction("what blocks are left out of is not compiled", "compile", "drop_path")
        if self.compile and self.dropout and self.mode == "finetune" and not self.arch.startswith(STAGED):
            raise Contradiction("only a ResNet is compiled with dropout before its head", "compile", "dropout")
        if self.mode == "finetune" and self.freeze == "auto" and not self.may_fit_head:
            raise Contradiction("freeze auto goes by the folds of a fitted head", "freeze", "head_init")
        frozen = [("mode", self.mode == "feature_extract"), ("freeze", self.freeze not in ("none", "auto"))]
        frozen += [("freeze_epochs", self.freeze_epochs > 0), ("batchnorm", self.batchnorm == "frozen")]
        for key, is_frozen in frozen:
            if is_frozen and self.weights == "none":
                raise Contradiction(
                    "a frozen random network learns nothing: give weights, or freeze nothing", "weights", key
                )
        return self


SCHEMA: dict[str, dict[str, Any]] = TypeAdapter(Config).json_schema()["properties"]

GROUPS = {
    "Run": [
        *("run", "runs", "overwrite", "prepare", "seed", "deterministic", "checkpoint_minutes", "keep_checkpoints"),
    ],
    "Data": ["data", "val_fraction", "class_names", "skip_bad_files", "cache_gb"],
    "Images": [
        *("image_size", "first_image_size", "grow_epochs", "eval_size", "resize", "shrink", "crop_mode"),
        *("transparency", "crop_scale_min", "crop_ratio_max", "flip_probability", "augment"),
        *("vertical_flip_probability", "quarter_turns", "rotation", "shear", "translation", "brightness"),
        *("contrast", "saturation", "hue", "grey_probability", "blur_probability", "erase_probability"),
        *("mixup_alpha", "cutmix_alpha", "sampler", "views_per_photo"),
    ],
    "Loader": ["loader", "loader_threads", "memory_gb", "prefetch"],
    "Model": [
        *("arch", "weights", "mode", "freeze", "freeze_epochs", "unfreeze", "batchnorm", "head_init", "channels_last"),
        "compile",
    ],
    "Training": [
        "epochs",
        "max_steps",
        "patience",
        "batch_size",
        "max_batch_per_device",
        "class_weights",
        "label_smoothing",
        "dropout",
        "drop_path",
        "teacher",
        "teacher_weight",
        "teacher_temperature",
        "clip_grad_norm",
        "ema_decay",
    ],
    "Optimizer": [
        "optimizer",
        "lr",
        "lr_body",
        "layer_decay",
        "momentum",
        "nesterov",
        "weight_decay",
        "weight_decay_on",
        "schedule",
        "min_lr",
        "step_epochs",
        "step_gamma",
        "warmup_epochs",
    ],
    "Evaluation": ["best_by", "test_flips", "eval_batch_per_device"],
    "Logging": ["log_every", "tracker", "project", "tags", "group", "alerts", "log_model", "compare_to"],
}


def parse_config(argv: list[str]) -> tuple[Config, str]:
    """Reads the command line and the recipe that it names.

    `argv` is what follows the script's name. Without `--config` the recipe is `configs/finetune.yaml` beside
    `train.py`. Returns the config and the recipe's name, its file's name without the ending. Anything wrong is a
    `UserError` of one line. `--help` prints the flags and exits with 0, as argparse does.
    """
    flags = _read_flags(argv)
    given = flags.pop("config", None)
    path = DEFAULT_RECIPE if given is None else Path(given)
    if given is None and not path.is_file():
        raise UserError(f"{path}: the default recipe is missing: run from a clone of dalitune, or give --config FILE")
    recipe = read_recipe(path)
    origins = dict.fromkeys(recipe, str(path))
    # Before the flags cover it: a fault of the recipe that shows up only without some flag is hard to find.
    _check_fields(recipe, origins)
    origins |= {key: f"--{key}" for key in flags}
    _check_fields(flags, origins)
    return _built(recipe | flags, origins), path.stem


def not_named(argv: list[str]) -> set[str]:
    """The settings that stand on no command line and in no recipe that it names."""
    flags = _read_flags(argv)
    return set() if "config" in flags else SCHEMA.keys() - flags.keys()


def recipe_given(argv: list[str]) -> Path | None:
    """The file that `--config` names on the command line; None without it."""
    given = _read_flags(argv).get("config")
    return None if given is None else Path(given)


def config_of(settings: Mapping[str, Any], source: object) -> Config:
    """The config of settings that are kept, as in a checkpoint; what they lack has its default.

    UserError, which names `source`, where they are none of this version.
    """
    values = _known(dict(settings), source)
    origins = dict.fromkeys(values, str(source))
    _check_fields(values, origins)
    return _built(values, origins)


def _built(values: dict[str, Any], origins: dict[str, str]) -> Config:
    """Values that are possible one by one, put together. origins: by key, where its value comes from."""
    try:
        return Config(**values)
    except ValidationError as error:
        contradiction = error.errors()[0]["ctx"]["error"]
        settings = [
            f"{key} {_spelled(values.get(key, SCHEMA[key]['default']))} ({origins.get(key, 'the default')})"
            for key in contradiction.keys
        ]
        raise UserError(f"{' and '.join(settings)} do not go together: {contradiction}") from None


def dump_yaml(config: Config) -> str:
    """All settings, in the order of the fields, as YAML that `--config` reads back to an equal `Config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def settings_page() -> str:
    """docs/settings.md: for each group a heading and a table of flag, default, the default recipe's value, meaning."""
    parts, recipe = [_PAGE_BEGINS], _of_default_recipe()
    for group, keys in GROUPS.items():
        lines = [f"## {group}", "", "| flag | default | finetune.yaml | meaning |", "|---|---|---|---|"]
        for key in keys:
            of_recipe = f"`{recipe[key]}`" if key in recipe else ""
            lines.append(f"| `--{key}` | `{_spelled(SCHEMA[key]['default'])}` | {of_recipe} | {_meaning(key)} |")
        parts.append("\n".join(lines))
    for key, schema in SCHEMA.items():
        if len(schema.get("enum", [])) > _MOST_NAMED:
            names = textwrap.fill(", ".join(f"`{value}`" for value in schema["enum"]), 120)
            parts.append(f"## Values of {key}\n\n{names}")
    return "\n\n".join(parts) + "\n"


def _of_default_recipe() -> dict[str, str]:
    """What the recipe that runs without `--config` sets otherwise than the defaults, as it spells it."""
    recipe = read_recipe(DEFAULT_RECIPE) if DEFAULT_RECIPE.is_file() else {}
    values = {key: str(value) for key, value in recipe.items()}
    return {key: value for key, value in values.items() if value != _spelled(SCHEMA[key]["default"])}


class _RecipeLoader(yaml.SafeLoader):
    """YAML whose plain values are text or null. As on the command line, the field's type decides how a text is read.

    YAML's own types would take `lr: 1e-3` for a string, `run: 010` for 8 and `epochs: true` for a boolean. A tag that
    would build anything else is refused.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the base class)
        letter: [pair for pair in pairs if pair[0] == "tag:yaml.org,2002:null"]
        for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    yaml_constructors = {  # noqa: RUF012 (as in the base class)
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # `!!map x` brings a node without keys, which the base class refuses.
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        seen = set[str]()
        for key in keys:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{_shown(key.value)} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings that a recipe names, as text or null. UserError where it is not one."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_RECIPE + 1)
        if len(text) > _LARGEST_RECIPE:
            raise ValueError(f"it has more than {_LARGEST_RECIPE >> 10} KiB")
        values = yaml.load(text, _RecipeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); name a YAML file") from None
    # The last two come of an escape that is no character, "\UFFFFFFFF".
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a recipe: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a recipe: it must hold lines of the form `key: value`")
    number = values.pop("format", "1")  # a run's config.yaml has it
    if not (isinstance(number, str) and re.fullmatch(r"[1-9][0-9]{0,8}", number) and int(number) <= FORMAT):
        raise UserError(
            f"{path}: is of format {_shown(number)}, and this version of dalitune reads up to {FORMAT}: use "
            "the version that wrote it, or a newer one"
        )
    known = _known(values, path)
    # YAML's own words for it are ~ and null; quoted, they are text.
    is_none = {key for key, value in known.items() if str(value).lower() == "none" and _means_null(key, "none")}
    return {key: None if key in is_none else value for key, value in known.items()}


def _known(values: dict[str, Any], source: object) -> dict[str, Any]:
    """The settings under the names of this version. UserError where it knows one of them not at all."""
    for old in [key for key in values if key in RETIRED]:
        value, new = values.pop(old), RETIRED[old]
        if new is not None:
            values.setdefault(new, value)
        _say_once(f"{source}: {old} {f'is called {new} now' if new else 'is no setting any more, and is passed over'}")
    for key in values:
        if key not in SCHEMA:
            raise UserError(f"{source}: unknown key {_shown(key)}; {_nearest(str(key))}--help lists all")
    return values


@functools.cache
def _say_once(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


class ScriptParser(argparse.ArgumentParser):
    """For a script with flags of its own; its docstring is the help. A mistake is a `UserError`, one line."""

    def __init__(self, name: str, docstring: str | None) -> None:
        super().__init__(
            prog=name,
            description=docstring,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_test_flips(self) -> None:
        """The setting of this name, as train.py's flag is given; None where a run's own counts."""
        self.add_argument(
            *("--test-flips", "--test_flips"),
            nargs="?",
            const=True,
            type=_true_or_false,
            metavar="VALUE",
            help="true or false: take the mean with each photo's mirror image, in twice the time (default: the run's)",
        )

    def add_unsure_for(self) -> None:
        """An accuracy of UNSURE_FOR that answers are to have which are not marked as unsure; None: none is marked."""
        self.add_argument(
            *("--unsure-for", "--unsure_for"),
            type=float,
            choices=UNSURE_FOR,
            metavar="ACCURACY",
            help="mark answers as unsure, so that of the others so many are right, by the run's validation photos: "
            f"{', '.join(f'{each:g}' for each in UNSURE_FOR)} (default: none is marked)",
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists what there is)")


def _true_or_false(text: str) -> bool:
    try:
        return TypeAdapter(bool).validate_python(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"cannot be {_shown(text)}; possible: true or false") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = "write --KEY VALUE, or --KEY=VALUE where the value begins with '-'"
        raise UserError(f"{message.removeprefix('argument ')}; {hint}")


def _build_parser() -> _Parser:
    parser = _Parser(
        description="Fine-tunes a ResNet on a folder of photos. The README says how to start.",
        usage="%(prog)s [--config FILE] [--KEY VALUE ...]",
        epilog="Flags win over the recipe, the recipe over the defaults. A recipe holds the same keys, `KEY: VALUE`. "
        "A flag may be written --KEY=VALUE too, and with - for _; a yes-or-no flag without a value means true.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="the recipe (default configs/finetune.yaml)")
    recipe = _of_default_recipe()
    for group, keys in GROUPS.items():
        section = parser.add_argument_group(group)
        for key in keys:
            bare: dict[str, Any] = {"nargs": "?", "const": "true"} if SCHEMA[key].get("type") == "boolean" else {}
            of_recipe = f"; finetune.yaml: {recipe[key]}" if key in recipe else ""
            text = f"{_meaning(key)} (default {_spelled(SCHEMA[key]['default'])}{of_recipe})"
            section.add_argument(f"--{key}", metavar="VALUE", help=text, **bare)
    return parser


def _read_flags(argv: list[str]) -> dict[str, Any]:
    argv = [_with_underscores(argument) for argument in argv]
    given, rest = _build_parser().parse_known_args(argv)
    if rest and rest[0].startswith("-"):
        flag = rest[0].partition("=")[0]
        raise UserError(f"unknown flag {_shown(flag)}; {_nearest(flag, dashes='--')}--help lists all")
    if rest:
        raise UserError(f"{_shown(rest[0])}: belongs to no flag; a value follows its flag, as in --epochs 5")
    names = [argument.partition("=")[0] for argument in argv if argument.startswith("--")]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}: given more than once; give it once")
    return {key: setting_of_text(key, value) for key, value in vars(given).items()}


def setting_of_text(key: str, text: str) -> str | None:
    """What a flag's text says of the setting `key`: None where that may be null and the text is a word for it."""
    return None if _means_null(key, text) else text


def _with_underscores(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    key = flag[2:].replace("-", "_")
    return f"--{key}{equals}{value}" if flag.startswith("--") and key in SCHEMA else argument


def _means_null(key: str, value: str) -> bool:
    parts = SCHEMA.get(key, {}).get("anyOf", [])
    words = {"", "~", "null", "none"}.difference(*(part.get("enum", []) for part in parts))
    return {"type": "null"} in parts and value.lower() in words


def _check_fields(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Raises for the first value that is wrong by itself. Contradictions are left for when all values are together."""
    try:
        Config(**values)
    except ValidationError as error:
        key = next((str(fault["loc"][0]) for fault in error.errors() if fault["loc"]), None)
        if key is not None:
            shown = _shown(values[key])
            raise UserError(
                f"{origins[key]}: {key} cannot be {shown}; possible: {_possible(key, str(values[key]))}"
            ) from None


def _nearest(name: str, dashes: str = "") -> str:
    """Words that offer the key most like an unknown one; none where no key is like it."""
    names = [*SCHEMA, "config"] if dashes else [*SCHEMA]
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), names, n=1)
    return f"the nearest is {dashes}{near[0]}; " if near else ""


def _meaning(key: str) -> str:
    return f"{SCHEMA[key]['description']} [{_possible(key)}]".replace("\n", " ")


def _possible(key: str, wrong: str = "") -> str:
    """The values that a key may have, in words; of many those most like the `wrong` one."""
    kinds = {"integer": "an integer", "number": "a finite number", "boolean": "true or false", "string": "text"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    words = []
    for part in SCHEMA[key].get("anyOf", [SCHEMA[key]]):
        limits = [f"{sign} {part[limit]:.10g}" for limit, sign in signs.items() if limit in part]
        if "enum" in part and len(part["enum"]) > _MOST_NAMED:
            words += [*difflib.get_close_matches(wrong, part["enum"]), f"one of {len(part['enum'])} (docs/settings.md)"]
        elif "enum" in part:
            words += part["enum"]
        elif "const" in part:
            words.append(part["const"])
        elif "pattern" in part:
            words.append("a name of letters, digits, '.', '_' and '-', 100 at most, the first no '.' and no '-'")
        else:
            words.append(" ".join([kinds.get(part["type"], "null"), " and ".join(limits)]).strip())
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _shown(value: Any) -> str:
    """A wrong value on one line."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a mapping"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _spelled(value: Any) -> str:
    """A value as a recipe spells it."""
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(settings_page(), end="")
