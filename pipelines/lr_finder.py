"""Draws a training's loss over its learning rate, which rises from step to step, and suggests a rate (Smith 2017).

    python -m pipelines.lr_finder --data photos/                                   # of the default recipe
    python -m pipelines.lr_finder --config own.yaml --batch_size 64 --highest 10   # of others; up to a rate of 10

All of train.py's settings are taken; the body's rate, and with layer_decay each stage's, keeps its proportion to the
head's. Nothing is left behind but the picture. On one process.
"""

import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.config import Config, ScriptParser, dump_yaml, parse_config
from pipelines.data.loader import Step
from pipelines.distributed.exits import run_script
from pipelines.errors import StopAgreed, Stopped, UserError
from pipelines.files import check_output
from pipelines.model.optimizer import set_learning_rates
from pipelines.run import figures
from pipelines.text import printable
from pipelines.training.build import Components, build, build_network
from pipelines.training.check import check
from pipelines.training.session import Session
from pipelines.training.step import StepSums, update

import numpy as np
from tqdm import tqdm

_DECADES = 6  # from the lowest rate to the highest
_KEPT = 0.9  # of the running mean of the loss in a step
_HOPELESS = 4  # times the lowest loss: from here on it only rises
_BELOW_LOWEST = 10  # by so much the suggestion is below the rate of the lowest loss, as fastai's
_FEWEST = 10  # steps that tell something


@dataclass(frozen=True)
class Curve:
    """rates: of the head, of each step; losses: the running mean after it, corrected for its start (Adam's)."""

    rates: np.ndarray
    losses: np.ndarray

    @property
    def suggestion(self) -> float:
        """A tenth of the rate of the lowest loss."""
        return float(self.rates[int(np.argmin(self.losses))] / _BELOW_LOWEST)


def main(arguments: list[str]) -> None:
    """One search. UserError where the settings leave nothing to train with a rate."""
    parser = ScriptParser("python -m pipelines.lr_finder", __doc__)
    parser.add_argument("--highest", type=float, default=1.0, metavar="RATE", help="where the rise ends (default 1)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="steps of the rise (default 100)")
    parser.add_argument("--picture", type=Path, default=Path("lr_finder.png"), metavar="PNG", help="where to draw it")
    options, settings = parser.parse_known_args(arguments)
    config, _ = parse_config(settings)
    if config.epochs == 0:
        raise UserError("epochs: 0: nothing is trained by a learning rate: give --epochs, or another recipe")
    if not (options.highest > 0 and options.steps >= _FEWEST):
        raise UserError(f"lr_finder: --highest must be above 0, and --steps at least {_FEWEST}")
    check_output(options.picture, figures.is_own_picture, "--picture")
    try:
        curve = search(config, options.highest, options.steps)
    except Stopped:
        raise Stopped("lr_finder: stopped; nothing is kept") from None
    lr = curve.suggestion
    body = "" if config.lr_body in (None, config.lr) else f" --lr_body {lr * config.lr_body / config.lr:.2g}"
    if config.freeze_epochs and config.mode == "finetune":
        print("freeze_epochs plays no part in a search: the body was trained with the head")
    print(f"the loss is lowest, {curve.losses.min():.3f}, at a rate of {_BELOW_LOWEST * lr:.2g}; a tenth of that:")
    print(f"--lr {lr:.2g}{body}")
    if (lowest := int(np.argmin(curve.losses))) == len(curve.losses) - 1:
        print("the loss still fell at the last step: more --steps, or a higher --highest, would tell where it ends")
    elif lowest == 0:
        print("the loss was lowest at the first step, so this suggests nothing: give more --steps")
    draw = partial(figures.save_lr_search, options.picture, curve.rates, curve.losses, lr)
    if figures.attempt(options.picture.name, draw):
        print(f"picture: {printable(options.picture)}")


def search(config: Config, highest: float, steps: int) -> Curve:
    """The curve of at most `steps` updates; it ends where the loss is lost."""
    rates, means, mean = list[float](), list[float](), 0.0
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        own = replace(config, runs=folder, run="search", tracker="none", prepare=False, compare_to=None)
        own = replace(own, freeze_epochs=0, unfreeze="together")
        recipe.write_text(dump_yaml(own), encoding="utf-8")
        checked = check(["--config", str(recipe)])
        assert checked is not None, "a new run has something to do"
        if checked.state.num_processes > 1:
            raise UserError("lr_finder: it is for one process: start it with python -m pipelines.lr_finder")
        built = build_network(checked)
        with Session(checked) as session, tqdm(total=steps, desc="search", unit="step", disable=None) as progress:
            components, model = build(checked, built, session)
            if components.start.reason:  # of which rates are a part
                print(components.start.reason, flush=True)
            if components.start.head_restarts:
                components.network.reset_head()
            components.network.train()
            for step in islice(_steps(components, session), steps):
                rate = highest * 10 ** (_DECADES * (len(rates) / (steps - 1) - 1))
                set_learning_rates(components.optimizer, rate / checked.config.lr)
                what = (model, components.features, components.optimizer, step, session.votes())
                targets = (built.class_weights, components.teacher)
                sums, _ = update(*what, components.training, checked.accelerator, checked.config, *targets)
                total = StepSums(*sums.tolist())
                if total.stop_votes:
                    raise StopAgreed
                mean = _KEPT * mean + (1 - _KEPT) * total.loss / max(total.photos, 1)
                corrected = mean / (1 - _KEPT ** (len(rates) + 1))
                if not math.isfinite(corrected) or corrected > _HOPELESS * min(means, default=math.inf):
                    break
                rates.append(rate)
                means.append(corrected)
                progress.update()
    if len(rates) < _FEWEST:
        raise UserError(f"lr_finder: the loss is lost after {len(rates)} steps: give less than --highest {highest:g}")
    return Curve(np.array(rates), np.array(means))


def _steps(components: Components, session: Session) -> Iterator[Step]:
    """Those of one epoch after another, without end."""
    for epoch in count():
        components.prepare(epoch, session.stop_is_asked)
        yield from components.training.epoch(epoch, images=not components.features.are_kept)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
