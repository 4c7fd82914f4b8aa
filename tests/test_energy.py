"""The energy of a layer's output against its definition in float64."""

import pytest
import torch

from qtool import energy
from qtool.energy import ENERGY_COLUMNS, output_energy, relative_error


def test_by_hand():
    """(1, 2) H (1, 2)ᵀ with H = [[2, 1], [1, 3]] is 2 + 4 + 12; damped by (1, 1), which count 1 + 4, it is 13."""
    weight, hessian = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert output_energy(weight, hessian) == 18
    assert output_energy(weight, hessian, torch.ones(2)) == 13
    assert output_energy(weight, None) == 5


@pytest.mark.parametrize("max_elements", [1, 1 << 20])
@pytest.mark.parametrize("columns", [1, ENERGY_COLUMNS - 1, ENERGY_COLUMNS, ENERGY_COLUMNS + 1, 300])
def test_it_is_the_trace(monkeypatch, columns, max_elements):
    """Also of a weight that lies the other way round, and a row at a time."""
    monkeypatch.setattr(energy, "MAX_ELEMENTS", max_elements)
    generator = torch.Generator().manual_seed(columns)
    weight, x = torch.randn(7, columns, generator=generator), torch.randn(500, columns, generator=generator)
    hessian, damping = x.T @ x / 500, torch.rand(columns, generator=generator)
    w, damped = weight.double(), hessian.double() - damping.double().diag()
    want = torch.trace(w @ damped @ w.T).item()
    for laid in (weight, weight.T.contiguous().T):
        assert output_energy(laid, hessian, damping) == pytest.approx(want, rel=1e-5)


def test_a_layer_without_energy_loses_nothing():
    assert relative_error(0.0, 0.0) == 0
    assert relative_error(-1e-9, 1.0) == 0
