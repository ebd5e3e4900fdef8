"""Which engine is taken, and why."""

from pipelines.data.engines.factory import ENGINES, choose_engine
from pipelines.errors import UserError
from tests.helpers.engines import CPU

import pytest
import torch


def test_auto_says_which_engine_and_why():
    name, why = choose_engine("auto", CPU)
    assert name in ENGINES
    assert why.startswith("no GPU")
    assert choose_engine("pillow", torch.device("cuda", 0)) == ("pillow", "as asked")


def test_dali_of_another_cuda_is_refused_before_it_crashes(monkeypatch):
    """PyTorch's version is a stand-in: no GPU is needed to read two version numbers."""
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    with pytest.raises(
        UserError, match=r"loader: DALI is built for CUDA 1\d, PyTorch for CUDA 11: install .*, or use --loader pillow"
    ):
        choose_engine("dali", gpu)
    name, why = choose_engine("auto", gpu)
    assert name in ENGINES[1:]
    assert "CUDA 11" in why
