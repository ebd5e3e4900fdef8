"""What is done to a photo before a network sees it: one object for training, evaluation, deploy and model.json."""

from dataclasses import dataclass

# ImageNet's channel means and standard deviations of pixels in [0, 1], which torchvision's weights were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """What is done to an upright RGB photo: shorter side to `resize`, the central square of `image_size` pixels, both
    as in `EvalPlan`, bilinear with antialiasing; then, on the 0..1 scale, minus `mean`, divided by `std` (R, G, B).
    """

    resize: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    transparency: str = "white"  # what transparent pixels are composed on, as in `Split`
