"""One training run: epochs, evaluation, checkpoints, result."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randbatch._errors import InvalidValue, UserError
from randbatch._files import append_text, json_text, make_folder, write_record, write_text
from randbatch._folders import locked, remove_stale
from randbatch._optional import require
from randbatch.models import GraphTransformer
from randbatch.train.checkpoint import save_checkpoint, save_tensors
from randbatch.train.config import RunConfig
from randbatch.train.data import Dataset, Graph, Metric
from randbatch.train.folder import (
    CHECKPOINT,
    LOG,
    RESULT,
    WEIGHTS,
    Kept,
    fresh_state,
    make_result,
    read_run,
    settings_of,
)
from randbatch.train.machine import commit, peak_memory, pick_device, reset_peak_memory, versions
from randbatch.train.metrics import loss, score

__all__ = ["Diverged", "Trainer", "check_rate", "make_model", "train_here", "train_run"]

_LARGEST_RATE = torch.finfo(torch.float32).max / 10  # the first step of AdamW is ten times the rate, in float32


class Diverged(UserError, ArithmeticError):
    """Loss, weights or predictions are no longer finite: there is nothing to score."""


@dataclass(frozen=True, eq=False)
class _Minibatch:
    """Some graphs as one: their edges in the form the model runs fastest on."""

    graph: Graph
    edges: tuple[Tensor, ...]
    batch: Tensor | None


def make_model(config: RunConfig, dataset: Dataset) -> GraphTransformer:
    """The model of a run, untrained."""
    return GraphTransformer(
        dataset.graphs[0].x.shape[1],
        dataset.num_outputs,
        channels=config.hidden,
        layers=config.layers,
        heads=config.heads,
        local=config.local,
        attention=config.attention,
        batch_size=config.config(),
        order=config.order,
        dropout=config.dropout,
        input_dropout=config.input_dropout,
        attention_dropout=config.attention_dropout,
        seed=config.seed,
    )


def check_rate(config: RunConfig) -> None:
    """Check that the optimizer can compute with the learning rate.

    Raises:
        InvalidValue: it is beyond float32.
    """
    if not config.lr < _LARGEST_RATE:
        raise InvalidValue(f"lr must be below {_LARGEST_RATE:.0e}, got {config.lr}")


class Trainer:
    """A model, its optimizer and its data on a device."""

    def __init__(self, config: RunConfig, dataset: Dataset) -> None:
        check_rate(config)
        torch.manual_seed(config.seed)
        self.config = config
        self.dataset = dataset
        self.metric: Metric = dataset.metric
        self.device = pick_device(config.device)
        self.commit = commit()
        self.model = make_model(config, dataset).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        graphs = [graph.to(self.device) for graph in dataset.graphs]
        self.train_graphs = [graph for graph in graphs if bool(graph.train.any())]
        judged = [graph for graph in graphs if bool((graph.val | graph.test).any())]
        self.judged = [self._collate(part) for part in _parts(judged, config.graphs_per_step)]
        # One graph is prepared once; parts of several are drawn anew every epoch.
        self.only = self._collate(self.train_graphs) if len(self.train_graphs) == 1 else None

    def _collate(self, graphs: Sequence[Graph]) -> _Minibatch:
        if len(graphs) == 1:
            whole, batch = graphs[0], None
        else:
            sizes = torch.tensor([len(graph.x) for graph in graphs], device=self.device)
            batch = torch.arange(len(graphs), device=self.device).repeat_interleave(sizes)
            starts = (sizes.cumsum(0) - sizes).tolist()
            edges = [graph.edge_index + start for graph, start in zip(graphs, starts, strict=True)]
            joined = {
                name: torch.cat([getattr(graph, name) for graph in graphs])
                for name in ("x", "y", "train", "val", "test")
            }
            whole = Graph(edge_index=torch.cat(edges, dim=1), **joined)
        return _Minibatch(whole, self.model.prepare_edges(whole.edge_index, len(whole.x)), batch)

    def train_epoch(self, lr: float) -> float:
        """Train on every training graph once; the mean loss per node.

        Raises:
            Diverged: a loss or a weight is not finite.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.only is not None:
            steps = iter([self.only])
        else:
            order = torch.randperm(len(self.train_graphs)).tolist()
            parts = _parts([self.train_graphs[i] for i in order], self.config.graphs_per_step)
            steps = (self._collate(part) for part in parts)
        total, count = 0.0, 0
        for step in steps:
            graph = step.graph
            logits = self.model(graph.x, step.edges, step.batch)
            value = loss(logits[graph.train], graph.y[graph.train])
            now = float(value.detach())
            if not math.isfinite(now):
                raise Diverged(f"the loss is {now}")
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            nodes = int(graph.train.sum())
            total, count = total + now * nodes, count + nodes
        if not bool(torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all()):
            raise Diverged("a weight is not finite")
        return total / count

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Scores on the validation and the test nodes.

        Raises:
            Diverged: a prediction is not finite.
        """
        self.model.eval()
        found: dict[str, list[tuple[Tensor, Tensor]]] = {"val": [], "test": []}
        for step in self.judged:
            logits = self.model(step.graph.x, step.edges, step.batch)
            for role, pairs in found.items():
                chosen: Tensor = getattr(step.graph, role)
                pairs.append((logits[chosen], step.graph.y[chosen]))
        scores: dict[str, float] = {}
        for role, pairs in found.items():
            logits, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            if not bool(logits.isfinite().all()):
                raise Diverged("a prediction is not finite")
            scores[role] = score(self.metric, logits, y)
        return scores


def train_run(config: RunConfig, dataset: Dataset, folder: Path, *, label: str = "train") -> dict[str, Any]:
    """Train one model, leaving log, weights, checkpoint and `result.json` in `folder`; return the result.

    If the folder holds a checkpoint of the same settings and the same data, the run resumes from it, to the results of
    a run that was never interrupted. More epochs are allowed if the learning rate does not decay. Interrupt it at any
    time: the last finished epoch is on the disk.

    Raises:
        InvalidValue: the folder is not new, or a file of the run is damaged, of another model, of other settings, of
            other data; or another process is writing there. The folder stays as it was.
        Diverged: the loss is no longer finite; the epochs before are on the disk.
    """
    trainer = Trainer(config, dataset)
    make_folder(folder)
    with locked(folder):
        return train_here(trainer, folder, label=label)


def train_here(trainer: Trainer, folder: Path, *, label: str, beside: Sequence[str] = ()) -> dict[str, Any]:
    """`train_run` by a caller who holds the lock of the folder; the files `beside` in it are the caller's."""
    config, dataset = trainer.config, trainer.dataset
    kept = read_run(folder, config, dataset, lambda: trainer.model, beside=beside)
    remove_stale(folder)
    if kept is not None and kept.result is not None and kept.state["epoch"] == config.epochs:
        return kept.result
    state = fresh_state() if kept is None else kept.state
    lines = [] if kept is None else list(kept.lines)
    record = _Record(trainer, folder, kept)
    reset_peak_memory(trainer.device)
    epochs = range(state["epoch"] + 1, config.epochs + 1)
    shown = {"desc": label, "initial": state["epoch"], "total": config.epochs, "unit": "epoch", "disable": None}
    with require("tqdm").tqdm(epochs, **shown) as bar:
        for epoch in bar:
            try:
                line = _one_epoch(trainer, epoch, state, folder)
            except Diverged as error:
                raise Diverged(
                    f"training of {label} diverged in epoch {epoch}: {error}; try a smaller --lr, now {config.lr}"
                ) from error
            lines.append(line)
            state["epoch"] = epoch
            state["peak_memory_bytes"] = max(state["peak_memory_bytes"], peak_memory(trainer.device))
            record.add(line, state)
            val = "" if state["val"] is None else f"{line.get('val', state['val']):.4f}"
            bar.set_postfix(loss=f"{line['loss']:.4f}", val=val)
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    made_with = {"versions": versions(trainer.device), "commit": trainer.commit}
    result = make_result(config, dataset, state, lines, num_parameters, made_with)
    write_record(folder / RESULT, result)
    return result


class _Record:
    """Log and checkpoint of a run. The checkpoint is written last: an epoch that it does not hold did not happen."""

    def __init__(self, trainer: Trainer, folder: Path, kept: Kept | None) -> None:
        self.trainer, self.folder = trainer, folder
        self.log = hashlib.sha256()
        if kept is None:
            self._save(fresh_state())  # first of all: it marks the folder as that of a run
        else:
            kept.checkpoint.restore(trainer.model, trainer.optimizer, stepped=kept.state["epoch"] > 0)
        text = "" if kept is None else kept.log
        write_text(folder / LOG, text)
        self.log.update(text.encode())

    def add(self, line: dict[str, Any], state: dict[str, Any]) -> None:
        """Note an epoch."""
        text = f"{json_text(line)}\n"
        append_text(self.folder / LOG, text)
        self.log.update(text.encode())
        self._save(state)

    def _save(self, state: dict[str, Any]) -> None:
        about = _about(self.trainer) | {"state": state, "log": self.log.hexdigest()}
        save_checkpoint(self.folder / CHECKPOINT, self.trainer.model, self.trainer.optimizer, about)


def _about(trainer: Trainer) -> dict[str, Any]:
    return {"settings": settings_of(trainer.config), "data": trainer.dataset.fingerprint}


def _one_epoch(trainer: Trainer, epoch: int, state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, evaluate when it is time, keep the weights if they are the best so far; the line of the log."""
    start = time.perf_counter()
    line: dict[str, Any] = {"epoch": epoch, "loss": trainer.train_epoch(trainer.config.lr_of(epoch))}
    line["seconds"] = time.perf_counter() - start
    if epoch % trainer.config.eval_every == 0 or epoch == trainer.config.epochs:
        line |= trainer.evaluate()
        if state["val"] is None or line["val"] > state["val"]:
            state |= {"best_epoch": epoch, "val": line["val"], "test": line["test"]}
            save_tensors(folder / WEIGHTS, trainer.model.state_dict(), _about(trainer) | {"epoch": epoch})
    return line


def _parts(graphs: Sequence[Graph], size: int) -> list[Sequence[Graph]]:
    return [graphs[start : start + size] for start in range(0, len(graphs), size)]
