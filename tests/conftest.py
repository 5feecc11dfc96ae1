"""Every annotated call of the package is checked for shapes and dtypes while the tests run.

Memory that torch does not initialise holds NaN, so that whoever reads before writing is seen.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
os.environ["TRITON_INTERPRET"] = "1"  # triton reads it where kernels are defined; there need not be a GPU

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from uninitialised import filled

jaxtyping.install_import_hook("randbatch", "beartype.beartype")  # before anything imports randbatch
collect_ignore = [
    "compile_kernels.py",
    "toys",
]  # a program, for a process without the interpreter; new entries of tables
torch.set_num_threads(1)  # the tensors are small, and the tests run side by side


@pytest.fixture(autouse=True, scope="session")
def _uninitialised() -> Iterator[None]:
    with filled():
        yield


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


@pytest.fixture(scope="module")
def toys() -> Iterator[None]:
    """The tables hold the toys, while the tests of a module run."""
    from toys import registered  # not before the hook

    with registered():
        yield
