import jaxtyping  # noqa: F401  (before randbatch, so that shapes are real)
import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("randbatch", "beartype.beartype")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
