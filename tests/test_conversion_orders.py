"""Norms and masks of parameters, put on and taken off before, between and after `convert` and `undo`: every order."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from converting import FLOAT64, ONE_BATCH
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import randbatch as rb


class Owns(nn.Module):
    """Attention whose projection is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(48, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


rb.convert.register(Owns)(rb.convert.through_sdpa)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def attention() -> nn.Module:
    return nn.MultiheadAttention(16, 4, batch_first=True)


Change = Callable[[nn.Module], object]
NAME = "in_proj_weight"


def remove(module: nn.Module) -> None:
    parametrize.remove_parametrizations(module, NAME)


NORMS: dict[str, tuple[Change, Change]] = {
    "parametrization": (lambda m: parametrize.register_parametrization(m, NAME, Double()), remove),
    "weight_norm": (lambda m: parametrizations.weight_norm(m, NAME), remove),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m, NAME), remove),
    "old weight_norm": (
        lambda m: nn.utils.weight_norm(m, NAME),
        lambda m: nn.utils.remove_weight_norm(m, NAME),
    ),
    "old spectral_norm": (
        lambda m: nn.utils.spectral_norm(m, NAME),
        lambda m: nn.utils.remove_spectral_norm(m, NAME),
    ),
    "prune": (lambda m: prune.l1_unstructured(m, NAME, 0.5), lambda m: prune.remove(m, NAME)),
}


def orders(left: tuple[str, ...], right: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All ways to do both, each in its own order."""
    if not left or not right:
        yield left + right
        return
    yield from ((left[0], *rest) for rest in orders(left[1:], right))
    yield from ((right[0], *rest) for rest in orders(left, right[1:]))


def state(module: nn.Module) -> tuple:
    return type(module).__mro__[-3:], type(module).__name__, sorted(vars(module)), sorted(module.state_dict())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("order", list(orders(("convert", "undo"), ("norm", "plain"))), ids=" ".join)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [attention, Owns])
def test_every_order(make: Callable[[], nn.Module], norm: str, order: tuple[str, ...]) -> None:
    """A twin that is never converted has the same norms at the same times, and gives the right answer."""
    torch.manual_seed(0)
    model = make().double().eval()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    report = None
    for step in order:
        if step == "convert":
            report = rb.convert(model, ONE_BATCH)
        elif step == "undo":
            assert report is not None
            report.undo()
        else:
            for module in (model, twin):
                torch.manual_seed(1)  # spectral norm draws its vectors
                NORMS[norm][step == "plain"](module)
        outs = [m(x, x, x, need_weights=False)[0] if make is attention else m(x) for m in (model, twin)]
        torch.testing.assert_close(*outs, **FLOAT64)
        converted = report is not None and order.index(step) < order.index("undo")
        assert hasattr(model, "randbatch_config") is converted
        if not converted:
            assert state(model) == state(twin)


@pytest.mark.parametrize("make", [attention, Owns])
def test_copies_of_a_normed_model(make: Callable[[], nn.Module]) -> None:
    model = make().double().eval()
    parametrizations.weight_norm(model, NAME)
    rb.convert(model, 3)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    first, second = (m(x, x, x, need_weights=False)[0] if make is attention else m(x) for m in (model, twin))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        model.__reduce_ex__(2)


def test_undo_is_refused_where_the_class_was_changed_since() -> None:
    class Other(nn.MultiheadAttention):
        pass

    model = attention()
    report = rb.convert(model, 3)
    swapped = type(model)
    model.__class__ = Other
    before = dict(vars(model))
    with pytest.raises(RuntimeError, match="was changed to Other after convert; undo that first"):
        report.undo()
    assert (type(model), dict(vars(model))) == (Other, before)
    model.__class__ = swapped
    report.undo()
    assert type(model) is nn.MultiheadAttention
    assert not hasattr(model, "randbatch_config")
