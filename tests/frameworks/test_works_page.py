"""The page of the documentation is what the table gives, and the table says nothing that no cell needs."""

from fnmatch import fnmatchcase
from pathlib import Path

import page
from refusals import REFUSALS
from subjects import subjects
from table import SECTIONS, expected

import randbatch as rb
from randbatch.estimators import ESTIMATORS
from randbatch.interactions import INTERACTIONS
from randbatch.kernels import BACKENDS
from randbatch.models import ATTENTIONS, CONVOLUTIONS

PAGE = Path(__file__).parents[2] / "docs" / "works_with.md"


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text() == page.write(), "run tests/scripts/works_with.py"


def test_every_refusal_refuses_something() -> None:
    used = [
        expected(section, subjects()[key], column)
        for section in SECTIONS.values()
        for key in section.rows()
        for column in section.columns
    ]
    assert [refusal for refusal in REFUSALS if refusal not in used] == []


def test_columns_of_refusals_exist() -> None:
    columns = [column for section in SECTIONS.values() for column in section.columns]
    for refusal in REFUSALS:
        for pattern in refusal.columns:
            assert any(fnmatchcase(column, pattern) for column in columns), pattern


def test_every_option_has_a_row() -> None:
    """A new estimator, interaction, backend, convolution or attention is a row at once."""
    names = {(row.group, row.name) for row in subjects().values()}
    for group in ("random_batch_attention", "nn.RandomBatchAttention"):
        for each in (*ESTIMATORS, *(name for name in INTERACTIONS if name != "softmax")):
            assert (group, each) in names
        for backend in BACKENDS:
            assert (group, f"backend={backend!r}") in names
    for local in CONVOLUTIONS:
        assert ("models.GraphTransformer", f"local={local!r}, attention='rba'") in names
    for attention in ATTENTIONS:
        assert any(f"attention={attention!r}" in name for _, name in names)
    assert {*rb.nn.__all__} - {"RandomBatchConfig"} <= {group.removeprefix("nn.") for group, _ in names}
