"""What can be told of the GPU benchmark without a GPU."""

import pytest
import torch

from benchmarks import gpu


def test_the_benchmark_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "giga"), [("ResNet-18", 1.81), ("ResNet-50", 4.1)])
def test_the_stand_in_for_a_step_has_the_model_s_flop(name, giga):
    """Published for one image: 1.81 and 4.1 billion multiplications and additions."""
    found = sum(gpu.rows_of(name, n, d) / 256 * n * d for n, d in gpu.MODELS[name]())
    assert found == pytest.approx(giga * 1e9, rel=0.06)
