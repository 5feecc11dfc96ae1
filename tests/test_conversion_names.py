"""The attribute of a converted module: its name, its former name, and a user's own attribute of the former name."""

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from converting import FLOAT64, ONE_BATCH, HandWritten, make_input
from torch import Tensor, nn

import randbatch as rb
from randbatch.nn import RandomBatch, RandomBatchAttention, RandomBatchConfig
from randbatch.nn.config import ATTRIBUTE, config_of


def converted(model: nn.Module) -> nn.Module:
    rb.convert(model, 4)
    return model


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: RandomBatchAttention(16, 4, 4),
    "wrapper": lambda: RandomBatch(nn.Linear(16, 16), 4),
    "torch": lambda: converted(nn.MultiheadAttention(16, 4)),
    "adapter": lambda: converted(HandWritten()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_former_name_reads_and_writes_with_a_warning(name: str) -> None:
    layer = LAYERS[name]()
    settings = getattr(layer, ATTRIBUTE)
    with pytest.warns(DeprecationWarning, match=f"`sampling` of .* is now called `{ATTRIBUTE}`"):
        assert layer.sampling is settings
    other = RandomBatchConfig(9)
    with pytest.warns(DeprecationWarning, match=ATTRIBUTE):
        layer.sampling = other
    assert config_of(layer) is other
    assert "sampling" not in vars(layer)


def test_the_warning_points_at_the_line_that_reads_or_writes() -> None:
    """In a process of its own: while tests run, the checks of shapes stand between."""
    code = """
import randbatch as rb
layer = rb.nn.RandomBatchAttention(8, 2, 4)
layer.sampling
layer.sampling = rb.nn.RandomBatchConfig(5)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert re.findall(r"^<string>:(\d+): DeprecationWarning", done.stderr, flags=re.MULTILINE) == ["4", "5"]


def test_the_former_name_goes_with_the_conversion() -> None:
    model = HandWritten()
    report = rb.convert(model, 4)
    report.undo()
    assert not hasattr(model, "sampling")
    assert config_of(model) is None


class Holds(nn.MultiheadAttention):
    """Its forward is torch's; it has an attribute that was ours once."""

    def __init__(self) -> None:
        super().__init__(16, 4, batch_first=True)
        self.sampling = "top-k"


class Buffers(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(16, 4, batch_first=True)
        self.register_buffer("sampling", torch.arange(3.0))


class Owns(nn.MultiheadAttention):
    """It counts how often it is asked."""

    asked = 0

    def __init__(self) -> None:
        super().__init__(16, 4, batch_first=True)

    @property
    def sampling(self) -> str:
        self.asked += 1
        return "nucleus"


class HoldsToo(HandWritten):
    def __init__(self) -> None:
        super().__init__()
        self.sampling = RandomBatchConfig(7)  # of the same class as ours, and none of our business


class Says(HandWritten):
    sampling = "beam"


def answer(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, x, x, need_weights=False)[0] if isinstance(model, nn.MultiheadAttention) else model(x)


@pytest.mark.parametrize("make", [Holds, Buffers, Owns, HoldsToo, Says])
def test_an_attribute_of_the_former_name_stays_its_owners(make: Callable[[], nn.Module]) -> None:
    model = make().double().eval()
    own, before, keys = model.sampling, dict(vars(model)), list(model.state_dict())
    x = make_input(model, 2, 11)
    want = answer(model, x)
    report = rb.convert(model, ONE_BATCH)
    assert model.sampling is own
    assert list(model.state_dict()) == keys
    assert config_of(model).batch_size == ONE_BATCH
    torch.testing.assert_close(answer(model, x), want, **FLOAT64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.sampling) is type(own)
        torch.testing.assert_close(answer(twin, x), want, **FLOAT64)
    if make in (Holds, HoldsToo, Says):
        model.sampling = "changed"
        assert model.sampling == "changed"
        assert config_of(model).batch_size == ONE_BATCH
        if make is Says:
            del model.sampling
            assert model.sampling == "beam"
        else:
            model.sampling = own
    report.undo()
    assert type(model) is make
    assert model.sampling is own
    assert vars(model).keys() == before.keys()


def test_a_subclass_of_the_layer_may_own_the_former_name() -> None:
    class Mine(RandomBatchAttention):
        def __init__(self) -> None:
            super().__init__(16, 4, 4)
            self.sampling = "mine"

    layer = Mine()
    assert layer.sampling == "mine"
    assert config_of(layer).batch_size == 4
    del layer.sampling
    with pytest.warns(DeprecationWarning, match=ATTRIBUTE):
        assert layer.sampling is config_of(layer)
    with pytest.raises(AttributeError, match="no attribute 'sampling' of its own"):
        del layer.sampling


class Untouched(nn.Module):
    """No forward of torch's reads what it does not set: a module is given one attribute, and no name of a user's."""

    def __init__(self) -> None:
        super().__init__()
        self.config = self.settings = self.options = self.batch_size = self.seed = "mine"

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.mT, dim=-1) @ x


@rb.convert.register(Untouched)
def _attend(module: Untouched, batches: rb.conversion.RandomBatches, x: Tensor) -> Tensor:
    return batches.attend(*(3 * [x.unsqueeze(2)]), scale=1.0).squeeze(2)


def test_one_attribute_is_all_that_a_module_is_given() -> None:
    model = Untouched()
    before = dict(vars(model))
    rb.convert(model, 4)
    assert vars(model).keys() - before.keys() == {ATTRIBUTE}
    assert all(vars(model)[name] is before[name] for name in ("config", "settings", "options", "batch_size", "seed"))
