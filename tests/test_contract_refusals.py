"""What has no meaning is refused with a sentence that names it, whatever the interaction; and what the table takes."""

from __future__ import annotations

from typing import Any

import contract
import pytest
import torch
from contract import WIDTH, N, inputs_of, make, op
from torch import Tensor, nn

import randbatch as rb
from randbatch._errors import InvalidType, InvalidValue
from randbatch.interactions import INTERACTIONS, Interaction, Kind

pytestmark = pytest.mark.usefixtures("toys")
every = pytest.mark.parametrize("name", contract.INTERACTION_NAMES)
every_layered = pytest.mark.parametrize("name", contract.LAYERED)


@every
@pytest.mark.parametrize(
    ("option", "value", "flag"),
    [("scale", 2.0, "has_scale"), ("dropout_p", 0.1, "has_dropout"), ("backend", "reference", "has_backends")],
)
def test_options_that_mean_nothing_are_refused(name: str, option: str, value: Any, flag: str) -> None:
    interaction = make(name)
    inputs = inputs_of(interaction)
    if getattr(interaction, flag):
        assert op(interaction, inputs, **{option: value}).isfinite().all()
        return
    with pytest.raises(InvalidValue, match=f"{option} must be .* with interaction {name!r}.*got"):
        op(interaction, inputs, **{option: value})


@every
def test_unknown_options_and_wrong_projections_are_refused(name: str) -> None:
    interaction = make(name)
    inputs = inputs_of(interaction)
    with pytest.raises(InvalidType, match="no option 'colour'"):
        op(interaction, inputs, colour=1)
    with pytest.raises(InvalidType, match=f"{name!r} takes {len(inputs)} projections .*got {len(inputs) + 1}"):
        op(interaction, [*inputs, inputs[0]])
    with pytest.raises(InvalidValue, match="batch_size must be at least"):
        op(interaction, inputs, batch_size=interaction.smallest_batch - 1)
    with pytest.raises(InvalidValue, match=f"interaction must be one of .*{name}.*got 'nobody'"):
        op("nobody", inputs)


class _Three(rb.interactions.Pairwise):
    """It has no meaning between two."""

    name, kind, smallest_batch = "three", Kind.SUM, 3

    def pair(self, block: Any, query: Tensor, key: Tensor) -> Tensor:
        return torch.einsum("mqhd,mphd->mqhp", query, key)


def test_batches_that_are_too_small_are_refused() -> None:
    inputs = inputs_of(_Three())
    assert op(_Three(), inputs, batch_size=3).isfinite().all()
    with pytest.raises(InvalidValue, match=r"batch_size must be at least 3\b.*, got 2"):
        op(_Three(), inputs, batch_size=2)
    with pytest.raises(InvalidValue, match="batch_size must be at least 3 with interaction 'three', got 2"):
        rb.nn.RandomBatchAttention(WIDTH, 2, 2, interaction=_Three())(torch.randn(N, WIDTH))


@every_layered
def test_a_layer_refuses_them_too(name: str) -> None:
    x = torch.randn(N, WIDTH)
    if not INTERACTIONS[name].has_backends:
        with pytest.raises(InvalidValue, match=f"backend must be 'auto' with interaction {name!r}"):
            rb.nn.RandomBatchAttention(WIDTH, 2, 4, interaction=name, backend="reference")
        config = rb.nn.RandomBatchAttention(WIDTH, 2, 4, interaction=name).randbatch_config
        with pytest.raises(InvalidValue, match="backend"):
            config.copy(backend="reference")
    if not INTERACTIONS[name].has_dropout:
        with pytest.raises(InvalidValue, match=f"dropout_p must be 0 with interaction {name!r}"):
            rb.nn.RandomBatchAttention(WIDTH, 2, 4, interaction=name, dropout=0.1)(x)
    if not INTERACTIONS[name].is_exponential:
        with pytest.raises(InvalidValue, match=f"tolerance must be None with interaction {name!r}"):
            rb.nn.RandomBatchAttention(WIDTH, 2, 4, interaction=name, tolerance=0.1)


def test_an_interaction_that_takes_other_projections_is_not_for_a_layer() -> None:
    class Alone(Interaction):
        name, kind, projections = "alone", Kind.FUNCTION, ("value",)

    with pytest.raises(InvalidValue, match="'alone' takes value"):
        rb.nn.RandomBatchAttention(WIDTH, 2, 4, interaction=Alone())


# The table


@pytest.mark.unchecked
@pytest.mark.parametrize("wrong", [int, 3, "linear"])
def test_only_interactions_are_registered(wrong: Any) -> None:
    with pytest.raises(InvalidType, match="must be a subclass of Interaction, got"):
        rb.interactions.register("wrong")(wrong)
    assert "wrong" not in INTERACTIONS


@every
def test_a_name_is_given_once(name: str) -> None:
    before = dict(INTERACTIONS)
    with pytest.raises(InvalidValue, match=f"interaction {name!r} is registered already"):
        rb.interactions.register(name)(type(INTERACTIONS[name]))
    assert list(INTERACTIONS) == list(before)
    assert INTERACTIONS[name].name == name


def test_the_toys_are_in_the_table_here_and_nowhere_else() -> None:
    import toys

    assert {"gaussian", "sigmoid-mean", "tempered"} <= set(INTERACTIONS)
    with toys.registered():  # once more
        assert list(INTERACTIONS) == contract.INTERACTION_NAMES
    assert "gaussian" in INTERACTIONS
    assert isinstance(INTERACTIONS["tempered"], nn.Module)
    assert INTERACTIONS["tempered"] is not INTERACTIONS["tempered"]


def test_what_is_no_attention_is_refused_where_attention_is_taken() -> None:
    """The op and the layer have query, key and value, and nothing else to give."""
    other = rb.interactions.Function(lambda x: x)
    for call in (
        lambda: rb.random_batch_attention(*torch.randn(3, 8, 1, 4), batch_size=4, interaction=other),
        lambda: rb.nn.RandomBatchAttention(8, 2, 4, interaction=other),
    ):
        with pytest.raises(InvalidValue, match="interaction must take query, key and value here, but 'function' takes"):
            call()


def test_the_choices_of_a_backend_are_all_named() -> None:
    with pytest.raises(InvalidValue, match=r"backend must be one of 'auto', .*; got 'autoo'. Did you mean 'auto'\?"):
        rb.random_batch_attention(*torch.randn(3, 8, 1, 4), batch_size=4, backend="autoo")
