"""The registry of conversion rules, a rule in one file, and `rb.convert` as a function."""

import copy
import importlib
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from converting import FLOAT64, ONE_BATCH, HandWritten, check, encoder, make_input
from test_integrations import TimmAttention
from torch import Tensor, nn
from torch_geometric.nn import GPSConv
from torch_geometric.nn.attention import PerformerAttention, PolynormerAttention, SGFormerAttention
from toys import rule as toy
from transformers import BertConfig, BertModel

import randbatch as rb
from randbatch.conversion.adapters import AdapterRule
from randbatch.conversion.libraries import LIBRARIES
from randbatch.conversion.rules import REGISTRY, Already, Convertible, Refused, Registry, Rule, Unknown
from randbatch.nn import RandomBatchConfig
from randbatch.nn.config import config_of

FILES = Path(importlib.import_module("randbatch.conversion.libraries").__file__).parent


# --- a rule is one file ---


def test_the_toy_rule_is_one_short_file() -> None:
    assert len(Path(toy.__file__).read_text().splitlines()) <= 40


def test_the_toy_rule_converts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch it is the module, forward and backward; in small ones the batches are drawn."""
    report = check(
        monkeypatch, lambda: toy.ToyMixer(16), lambda model: model(make_input(model, 2, 11)), modules=1, batch_size=3
    )
    assert [(row.rule, row.changes) for row in report.converted] == [
        ("toy attention", "a token meets its random batch")
    ]


def test_the_toy_rule_attends_inside_the_batches() -> None:
    """Each batch by itself, by the module's own forward."""
    model = toy.ToyMixer(16).double().eval()
    x = make_input(model, 1, 11)
    part = rb.random_partition(11, 4, seed=0)
    batches = [rows for block in part.split(part.order) for rows in block]
    want = torch.zeros_like(x)
    for rows in batches:
        want[:, rows] = model(x[:, rows])
    report = rb.convert(model, 4)
    config_of(model).seed = 0
    torch.testing.assert_close(model(x), want, **FLOAT64)
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(x), want, **FLOAT64)
    report.undo()
    assert type(model) is toy.ToyMixer
    assert config_of(model) is None


def test_the_toy_rule_says_why_not() -> None:
    model = nn.Sequential(toy.ToyMixer(16), toy.ToyMixer(16, power=2))
    report = rb.convert(model, 4)
    assert [row.path for row in report.converted] == ["0"]
    assert [(row.path, row.reason) for row in report.left_alone] == [("1", "a power of the weights is no softmax")]


# --- the registry ---


def test_every_file_of_a_library_is_in_the_table_or_beside_it() -> None:
    """A file with `RULES` that the table does not name would never be loaded."""
    names = {path.stem for path in FILES.glob("*.py") if "\nRULES = " in path.read_text()}
    assert names == set(LIBRARIES)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_rule_of_a_library_is_whole(name: str) -> None:
    """It says what it changes, and either serves a class or recognises some."""
    rules = importlib.import_module(f"randbatch.conversion.libraries.{name}").RULES
    assert rules
    for rule in rules:
        assert rule in REGISTRY.rules()
        assert rule.name
        assert rule.changes
        recognises = type(rule).serves is not Rule.serves
        assert recognises is (rule.cls is None)
        if not recognises:
            assert rule.serves(rule.cls)
        assert not rule.serves(nn.Linear)
        assert type(rule).swap is not Rule.swap
        if isinstance(rule, AdapterRule):
            assert type(rule).adapter is not AdapterRule.adapter


def rules_of_libraries() -> list[Rule]:
    return [
        rule for name in LIBRARIES for rule in importlib.import_module(f"randbatch.conversion.libraries.{name}").RULES
    ]


def test_names_of_rules_are_unique() -> None:
    names = [rule.name for rule in rules_of_libraries()]
    assert len(names) == len(set(names))


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
SAMPLES: dict[str, Callable[[], nn.Module]] = {
    "torch attention": lambda: nn.MultiheadAttention(16, 4, batch_first=True),
    "torch encoder": encoder,
    "pyg PerformerAttention": lambda: PerformerAttention(16, 4, 4),
    "pyg SGFormerAttention": lambda: SGFormerAttention(16, 2, 8),
    "pyg PolynormerAttention": lambda: PolynormerAttention(16, 2, 8),
    "pyg GPSConv": lambda: GPSConv(16, None, heads=4),
    "transformers attention": lambda: BertModel(BertConfig(**TINY)).encoder,
    "timm attention": TimmAttention,
    "toy attention": lambda: toy.ToyMixer(16),
}
"""A module for each rule, or one around such a module."""


def answer(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, nn.MultiheadAttention):
        return model(x, x, x, need_weights=False)[0]
    if isinstance(model, GPSConv):
        return model(x.flatten(0, 1), None, torch.arange(x.shape[0]).repeat_interleave(x.shape[1])).reshape(x.shape)
    out = model(x)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def state(model: nn.Module) -> list[tuple]:
    """All of a model that a rule could touch, but for the config that modules of transformers share."""
    return [(type(module), sorted(vars(module)), list(module._forward_pre_hooks)) for module in model.modules()]


def test_every_rule_of_a_library_has_a_sample() -> None:
    assert SAMPLES.keys() == {rule.name for rule in rules_of_libraries()} | {"toy attention"}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_contract_of_a_rule(name: str) -> None:
    """One batch is the module, small ones are not, eval repeats itself, copies are converted, and undo is complete."""
    model = SAMPLES[name]().eval()
    x, before = make_input(model, 2, 11), state(model)
    want = answer(model, x)
    report = rb.convert(model, ONE_BATCH)
    assert name in {row.rule for row in report.converted}
    torch.testing.assert_close(answer(model, x), want, rtol=1e-4, atol=1e-5)
    again = rb.convert(model, 3)
    small = answer(model, x)
    assert not torch.allclose(small, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(answer(model, x), small, rtol=0, atol=0)
    torch.testing.assert_close(answer(copy.deepcopy(model), x), small, rtol=0, atol=0)
    again.undo()
    torch.testing.assert_close(answer(model, x), want, rtol=1e-4, atol=1e-5)
    report.undo()
    assert state(model) == before
    torch.testing.assert_close(answer(model, x), want, rtol=0, atol=0)


def test_verdicts_have_names() -> None:
    cross = nn.MultiheadAttention(16, 4, kdim=8)
    assert REGISTRY.judge(nn.Linear(2, 2)) == Unknown()
    assert REGISTRY.judge(cross) == Refused("it is cross-attention: kdim 8 or vdim 16 is not embed_dim")
    verdict = REGISTRY.judge(attention := nn.MultiheadAttention(16, 4))
    assert isinstance(verdict, Convertible)
    assert verdict.rule.cls is nn.MultiheadAttention
    rb.convert(attention, 4)
    assert REGISTRY.judge(attention) == Already(holds_settings=True)
    assert REGISTRY.judge(rb.nn.RandomBatch(nn.Linear(2, 2), 4)) == Already(holds_settings=True)


class Counted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Child(Counted):
    """It leaves the forward alone."""


class Knows(Rule):
    """By its name, any class; it counts how often it is asked."""

    changes = "nothing"

    def __init__(self, name: str, known: str) -> None:
        self.name, self.known, self.asked = name, known, 0

    def serves(self, cls: type[nn.Module]) -> bool:
        self.asked += 1
        return cls.__name__ == self.known


def rule_for(registry: Registry, module: nn.Module) -> str:
    verdict = registry.judge(module)
    assert isinstance(verdict, Convertible)
    return verdict.rule.name


def test_the_newest_rule_of_the_nearest_class_is_taken() -> None:
    registry = Registry()
    registry.add(Knows("first", "Counted"))
    assert rule_for(registry, Child()) == "first"
    registry.add(Knows("second", "Counted"))
    assert rule_for(registry, Child()) == "second"
    registry.add(Knows("nearer", "Child"))
    assert rule_for(registry, Child()) == "nearer"
    assert rule_for(registry, Counted()) == "second"


def test_a_rule_that_is_added_comes_before_those_of_libraries() -> None:
    registry = Registry()
    assert rule_for(registry, nn.MultiheadAttention(16, 4)) == "torch attention"
    registry.add(Knows("mine", "MultiheadAttention"))
    assert rule_for(registry, nn.MultiheadAttention(16, 4)) == "mine"


def test_a_class_is_recognised_once() -> None:
    registry = Registry()
    registry.add(rule := Knows("first", "Counted"))
    for _ in range(5):
        registry.judge(Counted())
    assert rule.asked == 1


def test_a_library_that_is_not_loaded_is_not_imported() -> None:
    """In a process of its own, which has torch alone until the model needs more."""
    code = """
import sys, torch, randbatch as rb
heavy = lambda: {name.partition(".")[0] for name in sys.modules} & {"torch_geometric", "transformers", "timm"}
assert not heavy(), heavy()
rb.convert(torch.nn.TransformerEncoderLayer(8, 2), 4)
assert not heavy(), heavy()
from torch_geometric.nn.attention import PerformerAttention
print(rb.convert(PerformerAttention(8, 2, 4), 4).converted[0].rule)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "pyg PerformerAttention"


# --- `rb.convert` is a function ---


def test_convert_is_a_function_that_documents_itself() -> None:
    assert inspect.isfunction(rb.convert)
    assert rb.convert.__name__ == "convert"
    parameters = inspect.signature(rb.convert).parameters
    assert list(parameters) == ["model", "batch_size", "where", "seed", "options"]
    assert parameters["where"].kind is parameters["seed"].kind is inspect.Parameter.KEYWORD_ONLY
    for text in (rb.convert.__doc__, rb.convert.register.__doc__, rb.convert.through_sdpa.__doc__):
        assert "Example:" in text
        assert "Raises:" in text
    for name in parameters:
        assert f"{'**' if name == 'options' else ''}{name}:" in rb.convert.__doc__
    assert "module_class:" in rb.convert.register.__doc__


def test_an_unknown_option_is_named_with_those_that_are_taken() -> None:
    options = [each.name for each in fields(RandomBatchConfig) if each.init and each.name != "batch_size"]
    assert {"estimator", "rounds", "chunk_batches", "seed"} <= set(options)
    for call in (lambda: rb.convert(encoder(), 4, round=2), lambda: rb.conversion.hf.register(4, round=2)):
        with pytest.raises(TypeError, match="there is no option 'round'") as error:
            call()
        assert str(error.value).endswith(", ".join(options))


def test_every_option_reaches_the_modules() -> None:
    given = {"estimator": "debiased", "rounds": 2, "eval_rounds": 3, "backend": "sdpa", "exact_eval": True}
    given |= {"tolerance": 0.5, "chunk_batches": 2, "seed": 5}
    assert given.keys() | {"batch_size", "interaction"} == {
        each.name for each in fields(RandomBatchConfig) if each.init
    }
    report = rb.convert(model := HandWritten(), 4, **given)
    assert report.settings == RandomBatchConfig(4, **given)
    assert replace(config_of(model), seed=5) == RandomBatchConfig(4, **given)


def test_settings_are_given_as_a_whole() -> None:
    """They stay the caller's, and an option beside them comes first."""
    whole = RandomBatchConfig(4, rounds=2, seed=7)
    kept = copy.copy(whole)
    one, two, three = HandWritten(), HandWritten(), HandWritten()
    rb.convert(one, whole)
    rb.convert(two, 4, rounds=2, seed=7)
    report = rb.convert(three, whole, rounds=3, seed=8)
    assert config_of(one) == config_of(two)
    assert config_of(one) is not whole
    assert whole == kept
    assert report.settings == RandomBatchConfig(4, rounds=3, seed=8)
    assert config_of(three).seed != config_of(one).seed
    assert rb.convert(HandWritten(), whole, seed=0).settings.seed == 0


# --- what is called otherwise now ---


def test_the_former_home_works_with_a_warning() -> None:
    for name in ("hf", "RandomBatches"):
        with pytest.warns(
            DeprecationWarning, match=f"randbatch.integrations.{name} is now randbatch.conversion.{name}"
        ):
            assert getattr(rb.integrations, name) is getattr(rb.conversion, name)
    with pytest.raises(AttributeError, match="no attribute 'rules'"):
        rb.integrations.rules  # noqa: B018


def test_what_where_leaves_out_is_named_also_if_it_is_converted_already() -> None:
    model = nn.Sequential(HandWritten(), nn.MultiheadAttention(16, 4), HandWritten())
    rb.convert(model, ONE_BATCH)
    report = rb.convert(model, 4, where="2")
    assert [(row.path, row.kind, row.reason) for row in report.left_alone] == [
        ("0", "RandomBatchHandWritten", "left out by `where`"),
        ("1", "RandomBatchAttention", "left out by `where`"),
    ]
    assert [config_of(module).batch_size for module in model] == [ONE_BATCH, ONE_BATCH, 4]
