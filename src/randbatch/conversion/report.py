"""What `convert` did: which modules it converted, which it skipped and why, and how all that is undone."""

from __future__ import annotations

from dataclasses import dataclass, field

from randbatch.conversion.swap import Undo
from randbatch.nn.config import RandomBatchConfig

__all__ = ["ConversionReport", "Converted", "Skipped", "list_skipped"]


@dataclass(frozen=True)
class Converted:
    """A module that was converted.

    Attributes:
        path: where it is in the model; empty for the model itself.
        kind: its class before.
        rule: what converted it.
        changes: what that changes in meaning.
    """

    path: str
    kind: str
    rule: str
    changes: str


@dataclass(frozen=True)
class Skipped:
    """A module that looks like attention and was not converted.

    Attributes:
        path: where it is in the model; empty for the model itself.
        kind: its class.
        reason: why.
    """

    path: str
    kind: str
    reason: str


@dataclass
class ConversionReport:
    """What `convert` did; print it to see a table.

    Attributes:
        converted: one row for each module that was converted.
        left_alone: one row for each module that looks like attention and was not converted.
        settings: the settings that were given; each module has a copy with a seed of its own.
    """

    converted: list[Converted]
    left_alone: list[Skipped]
    settings: RandomBatchConfig
    _undo: list[Undo] = field(default_factory=list[Undo], repr=False)

    def undo(self) -> None:
        """Put everything back as it was before this conversion. Parameters keep their present values.

        Raises:
            RuntimeError: the class of a module was changed after the conversion; undo that first.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def on_undo(self, step: Undo) -> None:
        """Remember one more step to undo; the last one is undone first."""
        self._undo.append(step)

    def __str__(self) -> str:
        modules = "1 module" if len(self.converted) == 1 else f"{len(self.converted)} modules"
        s = self.settings
        rounds = f"rounds {s.rounds}" + ("" if s.eval_rounds is None else f" (eval {s.eval_rounds})")
        lines = [f"{modules} in random batches of {s.batch_size}, estimator {s.resolved()[1].name}, {rounds}"]
        lines += _table(["path", "class", "rule"], [[row.path, row.kind, row.rule] for row in self.converted])
        lines += ["", "what changes in meaning"]
        lines += [f"  {rule}: {changes}" for rule, changes in {row.rule: row.changes for row in self.converted}.items()]
        if self.left_alone:
            lines += ["", "left alone", *list_skipped(self.left_alone)]
        return "\n".join(lines)


def list_skipped(skipped: list[Skipped]) -> list[str]:
    """The lines of a table."""
    return _table(["path", "class", "why"], [[row.path, row.kind, row.reason] for row in skipped])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rows = [[path or "(model)", *rest] for path, *rest in rows]
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows]]
