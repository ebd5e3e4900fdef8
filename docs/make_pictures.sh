#!/usr/bin/env bash
# The pictures of the README, from a new run of configs/finetune.yaml on the ants and bees (minutes on a CPU):
#
#     bash docs/make_pictures.sh        # in an environment that has the suite installed; else: uv run bash docs/...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs="$(mktemp -d)"
trap 'rm -rf "$runs"' EXIT

python -m accelerate.commands.launch train.py --config configs/finetune.yaml --runs "$runs" --run finetune --tracker none
python -m accelerate.commands.launch evaluate.py "$runs/finetune"
# docs/inference.md has this one's figures.
python -m accelerate.commands.launch train.py --config configs/feature_extract.yaml --runs "$runs" --run fe --tracker none
cp "$runs/fe/figures/calibration.png" "$runs/finetune/figures/"

python - "$runs/finetune/figures" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image

# As small as they can be without a loss that shows: drawings as PNG with a palette, grids of photos as JPEG.
for name in ("curves", "calibration", "train_batch", "predictions_val", "confusion_matrix_val"):
    picture = Image.open(Path(sys.argv[1]) / f"{name}.png").convert("RGB")
    target = Path("docs") / name.removesuffix("_val")
    if name in ("train_batch", "predictions_val"):
        picture.save(target.with_suffix(".jpg"), quality=75, optimize=True, progressive=True)
    else:
        picture.quantize(128, method=Image.Quantize.MEDIANCUT).save(target.with_suffix(".png"), optimize=True)
PYTHON
ls -l docs
