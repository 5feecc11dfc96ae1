"""Every annotated call of the package is checked for shapes and dtypes while the tests run."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # triton reads it where kernels are defined; there need not be a GPU
jaxtyping.install_import_hook("randbatch", "beartype.beartype")  # before anything imports randbatch
collect_ignore = ["compile_kernels.py"]  # a program, for a process without the interpreter
torch.set_num_threads(1)  # the tensors are small, and the tests run side by side


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unchecked(request: pytest.FixtureRequest) -> Iterator[None]:
    """`@pytest.mark.unchecked`: wrong input reaches the package, as it would from a user."""
    off = request.node.get_closest_marker("unchecked") is not None
    jaxtyping.config.update("jaxtyping_disable", off)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
