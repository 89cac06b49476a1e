"""How a budget is shared out over layers, and that a full budget is not."""

import itertools

import pytest
import torch
from heads import geometry
from pydantic import ValidationError
from safetensors.torch import save_file

from kvoffload.attention.build import SliceBudget
from kvoffload.completion.calibrated import Calibration, write_calibration
from kvoffload.config import RuntimeConfig
from kvoffload.layer_budgets import KIND, LADDER, allocate, curve_name, layer_shares, read_layer_budgets
from kvoffload.units import Budget


def written(file, curves, completion=KIND):
    header = Calibration(
        completion=completion, model="m", weights="w", data="d", options={}, layers={i: {} for i in range(len(curves))}
    )
    write_calibration(file, header, {curve_name(i): curve for i, curve in enumerate(curves)})
    return file


def test_layers_alike_get_the_same():
    curve = torch.tensor([1.0, 0.6, 0.3, 0.2, 0.1])
    assert allocate(torch.stack([curve] * 5)) == (1.0,) * 5


def test_a_layer_that_loses_nothing_gives_its_part_away():
    steep, flat = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5]), torch.zeros(5)
    assert allocate(torch.stack([steep, flat, flat, flat])) == (2.0, 0.25, 0.25, 0.25)


def test_no_other_choice_of_corners_with_that_mean_is_better_on_convex_curves():
    generator = torch.Generator().manual_seed(3)
    steps = torch.rand(4, 4, generator=generator).sort(dim=1, descending=True).values * torch.tensor(LADDER).diff()
    curves = torch.cat([steps.sum(1, keepdim=True), steps.sum(1, keepdim=True) - steps.cumsum(1)], 1)
    shares = allocate(curves)

    def cost(choice):
        return sum(float(curve[LADDER.index(share)]) for curve, share in zip(curves, choice, strict=True))

    fitting = [choice for choice in itertools.product(LADDER, repeat=4) if sum(choice) <= sum(shares)]
    assert cost(shares) == pytest.approx(min(map(cost, fitting)))
    assert sum(shares) <= 4


def test_a_curve_that_rises_first_is_lifted_over_the_bump():
    bumpy, flat = torch.tensor([4.0, 5.0, 1.0, 0.9, 0.8]), torch.zeros(5)
    assert allocate(torch.stack([bumpy, flat]))[0] == 1.0


def test_a_share_scales_the_reads_of_a_layer_but_not_a_full_budget():
    shape = geometry()
    part, all_of_it = Budget.parse("10%"), Budget.parse("100%")
    assert SliceBudget(part, shape, 4, shape.slice_bytes, 2.0)(400) == 2 * SliceBudget(
        part, shape, 4, shape.slice_bytes
    )(400)
    assert SliceBudget(all_of_it, shape, 4, shape.slice_bytes, 0.25)(400) == 2 * 100


def test_a_configuration_takes_the_shares_from_the_file(tmp_path):
    steep, flat = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5]), torch.zeros(5)
    file = written(tmp_path / "b.safetensors", [flat.clone(), steep, flat.clone(), flat.clone()])
    config = RuntimeConfig(layer_budgets=file)
    assert [config.share(layer) for layer in range(4)] == [0.25, 2.0, 0.25, 0.25]
    assert layer_shares(read_layer_budgets(file)) == (0.25, 2.0, 0.25, 0.25)
    assert [found.header.weights for found in config.calibrations] == ["w"]
    assert RuntimeConfig().share(3) == 1.0


@pytest.mark.parametrize(
    "curves", [[torch.zeros(4)], [torch.full((5,), torch.nan)], []], ids=["too few budgets", "not finite", "no layer"]
)
def test_a_file_of_other_things_is_refused(tmp_path, curves):
    with pytest.raises(ValidationError, match="has no divergences of layers at 5 budgets"):
        RuntimeConfig(layer_budgets=written(tmp_path / "b.safetensors", curves))


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="must be a calibration of layer_budgets"):
        RuntimeConfig(layer_budgets=written(tmp_path / "b.safetensors", [torch.zeros(5)], "phi"))
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValidationError, match="must be made by kvoffload calibrate"):
        RuntimeConfig(layer_budgets=tmp_path / "x.safetensors")
