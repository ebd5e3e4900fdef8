"""What a script does not use at its start is not loaded then: it is seconds of every run."""

import subprocess
import sys

from tests.helpers.paths import ROOT

import pytest

HEAVY = (
    *("matplotlib", "torch._dynamo", "torch._inductor", "sympy", "torchmetrics", "wandb", "nvidia.dali"),
    *("scipy", "sklearn", "pandas", "mlflow", "onnx", "onnxruntime", "transformers", "tensorboard", "networkx"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["train", "evaluate", "deploy.predict", "pipelines.inspect_data", "pipelines.compare"]
)
def test_a_script_loads_nothing_heavy_that_it_may_not_use(module):
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.slow
def test_torch_dynamo_is_loaded_when_torchvision_needs_it():
    code = """
import pipelines, torch, torchvision
from torchvision.ops import roi_align
squares = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]
print(roi_align(torch.ones(1, 1, 8, 8), squares, 2).sum().item())
print(torchvision.ops.roi_align.__globals__["is_compile_supported"]("cpu"), torch._dynamo.is_compiling())
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4.0", "True", "False", "2.0"]
