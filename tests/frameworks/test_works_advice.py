"""What the page says to do instead of what is refused, done; and what is true of one row only."""

import warnings

import pytest
import torch
from derivatives import check_close, differences, directions, dot, gradients, leaves
from memory import backward
from subjects import MODEL, N, subjects
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import randbatch as rb

INNER = subjects()["nn.RandomBatch: TransformerEncoderLayer"]
BERT = subjects()["convert: Hugging Face BertModel"]


def test_second_derivative_of_torchs_attention_inside() -> None:
    module, inputs = INNER.module(), INNER.inputs()
    with sdpa_kernel(SDPBackend.MATH):
        first = gradients(INNER, module, inputs, create_graph=True)
        product = dot(first, directions(leaves(module, inputs)))
        found = torch.autograd.grad(product, leaves(module, inputs), allow_unused=True, materialize_grads=True)
        want = differences(INNER, True, lambda m, x: gradients(INNER, m, x))
    check_close(found, want)


def test_forward_mode_of_torchs_attention_inside() -> None:
    module, x = INNER.module().eval(), INNER.inputs()[0].detach()
    (along,) = directions([x])
    with sdpa_kernel(SDPBackend.MATH):
        _, found = jvp(module, (x,), (along,))
    judge, step = INNER.module().eval().double(), 1e-5
    with torch.no_grad():
        want = (judge(x.double() + step * along.double()) - judge(x.double() - step * along.double())) / (2 * step)
    check_close([found], [want], 1e-3)


def test_second_derivative_of_mean_over_neighbours() -> None:
    """With a message for every edge; the judge is the same in float64, differentiated numerically."""
    row = subjects()[f"{MODEL}: local='sage', attention='rba'"]
    model, x = row.module().eval(), row.inputs()[0]
    judge = row.module().eval().double()
    (along,) = directions([x])

    def first(model: nn.Module, x: Tensor, **options: bool) -> Tensor:
        assert isinstance(model, rb.models.GraphTransformer)
        edges = model.prepare_edges(row.more(N)[0], N, sparse=False)
        return torch.autograd.grad(model(x, edges).sin().sum(), x, **options)[0]

    (found,) = torch.autograd.grad((first(model, x, create_graph=True) * along).sum(), x)
    ends = [(x.detach().double() + step * along.double()).requires_grad_() for step in (1e-5, -1e-5)]
    check_close([found], [(first(judge, ends[0]) - first(judge, ends[1])) / 2e-5])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(use_reentrant: bool) -> None:
    """`gradient_checkpointing_enable`, in training, where every call draws."""
    want = backward(BERT.call, BERT.module().train(), BERT.inputs())
    module = BERT.module().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its name changes in transformers 6
        module.gradient_checkpointing_enable({"use_reentrant": use_reentrant})  # type: ignore[operator]
    torch.testing.assert_close(backward(BERT.call, module, BERT.inputs()), want, rtol=1e-5, atol=1e-5)
