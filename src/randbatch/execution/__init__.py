"""How a call is computed: a table of strategies, each of which says why it cannot.

The op, the layers, the wrapper and converted modules all go through `run`, so that a strategy made for one serves all.
"""

from __future__ import annotations

from randbatch.execution.call import Call, LinearProjections
from randbatch.execution.chunked import Chunked
from randbatch.execution.forms import Exact, Flattened, Observed
from randbatch.execution.opaque import Opaque
from randbatch.execution.projected import Projected
from randbatch.execution.table import STRATEGIES, Choice, Strategy, Whole, record, run

__all__ = ["STRATEGIES", "Call", "Choice", "LinearProjections", "Strategy", "record", "run"]

STRATEGIES.extend([Opaque(), Flattened(), Observed(), Exact(), Chunked(), Projected(), Whole()])
