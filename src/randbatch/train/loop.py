"""One training run: epochs, evaluation, checkpoints, result."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randbatch._files import read_json, write_json, write_text
from randbatch._optional import require
from randbatch.models import GraphTransformer
from randbatch.train.checkpoint import load_checkpoint, save_checkpoint, save_tensors
from randbatch.train.config import RunConfig, to_json
from randbatch.train.data import Dataset, Graph, Metric
from randbatch.train.machine import commit, peak_memory, pick_device, reset_peak_memory, versions
from randbatch.train.metrics import loss, score

__all__ = ["WEIGHTS", "Trainer", "read_log", "read_result", "train_run"]

CHECKPOINT, WEIGHTS, LOG, RESULT = "checkpoint.safetensors", "best.safetensors", "log.jsonl", "result.json"


@dataclass(frozen=True, eq=False)
class _Minibatch:
    """Some graphs as one: their edges in the form the model runs fastest on."""

    graph: Graph
    edges: tuple[Tensor, ...]
    batch: Tensor | None


class Trainer:
    """A model, its optimizer and its data on a device."""

    def __init__(self, config: RunConfig, dataset: Dataset) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.metric: Metric = dataset.metric
        self.device = pick_device(config.device)
        self.commit = commit()
        self.model = GraphTransformer(
            dataset.graphs[0].x.shape[1],
            dataset.num_outputs,
            channels=config.hidden,
            layers=config.layers,
            heads=config.heads,
            local=config.local,
            attention=config.attention,
            batch_size=config.batch_size,
            estimator=config.estimator,
            rounds=config.rounds,
            eval_rounds=config.eval_rounds,
            order=config.order,
            dropout=config.dropout,
            input_dropout=config.input_dropout,
            attention_dropout=config.attention_dropout if config.attention in ("rba", "full") else 0.0,
            chunk_batches=config.chunk_batches,
            seed=config.seed,
        ).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        graphs = [graph.to(self.device) for graph in dataset.graphs]
        self.train_graphs = [graph for graph in graphs if bool(graph.train.any())]
        if not self.train_graphs:
            raise ValueError(f"data set {dataset.name!r} has no node to train on")
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
        """Train on every training graph once; the mean loss per node."""
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
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            nodes = int(graph.train.sum())
            total, count = total + float(value.detach()) * nodes, count + nodes
        return total / count

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Scores on the validation and the test nodes."""
        self.model.eval()
        found: dict[str, list[tuple[Tensor, Tensor]]] = {"val": [], "test": []}
        for step in self.judged:
            logits = self.model(step.graph.x, step.edges, step.batch)
            for role, pairs in found.items():
                chosen: Tensor = getattr(step.graph, role)
                pairs.append((logits[chosen], step.graph.y[chosen]))
        return {
            role: score(self.metric, torch.cat([logits for logits, _ in pairs]), torch.cat([y for _, y in pairs]))
            for role, pairs in found.items()
        }


def train_run(config: RunConfig, dataset: Dataset, folder: Path, *, label: str = "train") -> dict[str, Any]:
    """Train one model, leaving log, weights, checkpoint and `result.json` in `folder`; return the result.

    If the folder holds a checkpoint of the same settings, the run goes on from it, to the numbers of a run that was
    never interrupted. More epochs are allowed if the learning rate does not decay. Interrupt it at any time: the last
    finished epoch is on the disk.

    Raises:
        ValueError: the checkpoint is truncated, of another model or of other settings. The folder stays as it was.
    """
    trainer = Trainer(config, dataset)
    state: dict[str, Any] = {"epoch": 0, "best_epoch": 0, "val": float("-inf"), "test": 0.0, "peak_memory_bytes": 0}
    free = {"root", "device"} if config.lr_decay else {"root", "device", "epochs"}  # what a resumed run may change
    settings = {name: value for name, value in to_json(config).items() if name not in free}
    if (folder / CHECKPOINT).exists():
        about = load_checkpoint(folder / CHECKPOINT, trainer.model, trainer.optimizer)
        _check_settings(folder, settings, about["settings"])
        state = about["state"]
        kept = [line for line in read_log(folder) if line["epoch"] <= state["epoch"]]
        write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in kept))
    else:
        write_text(folder / LOG, "")
    reset_peak_memory(trainer.device)
    epochs = range(state["epoch"] + 1, config.epochs + 1)
    bar = require("tqdm").tqdm(epochs, desc=label, initial=state["epoch"], total=config.epochs, unit="epoch")
    with bar:
        for epoch in bar:
            line = _one_epoch(trainer, epoch, state, folder)
            with (folder / LOG).open("a") as log:
                log.write(json.dumps(line) + "\n")
            state["epoch"] = epoch
            state["peak_memory_bytes"] = max(state["peak_memory_bytes"], peak_memory(trainer.device))
            about = {"state": state, "settings": settings}
            save_checkpoint(folder / CHECKPOINT, trainer.model, trainer.optimizer, about)
            bar.set_postfix(loss=f"{line['loss']:.4f}", val=f"{line.get('val', state['val']):.4f}")
    result = _result(trainer, state, folder)
    write_json(folder / RESULT, result)
    return result


def _one_epoch(trainer: Trainer, epoch: int, state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, evaluate when it is time, keep the weights if they are the best so far; the line of the log."""
    start = time.perf_counter()
    line: dict[str, Any] = {"epoch": epoch, "loss": trainer.train_epoch(trainer.config.lr_of(epoch))}
    line["seconds"] = time.perf_counter() - start
    if epoch % trainer.config.eval_every == 0 or epoch == trainer.config.epochs:
        line |= trainer.evaluate()
        if line["val"] > state["val"]:
            state |= {"best_epoch": epoch, "val": line["val"], "test": line["test"]}
            save_tensors(folder / WEIGHTS, trainer.model.state_dict(), {"epoch": epoch})
    return line


def _result(trainer: Trainer, state: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = trainer.config
    random = config.attention == "rba"
    return {
        "dataset": config.dataset,
        "attention": config.attention,
        "batch_size": config.batch_size if random else None,
        "estimator": config.estimator if random else None,
        "rounds": config.rounds if random else None,
        "seed": config.seed,
        "split": config.split,
        "metric": trainer.metric,
        "val": state["val"],
        "test": state["test"],
        "best_epoch": state["best_epoch"],
        "epochs": state["epoch"],
        "seconds_per_epoch": statistics.median(line["seconds"] for line in read_log(folder)),
        "peak_memory_bytes": state["peak_memory_bytes"],
        "num_parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "config": to_json(config),
        "versions": versions(trainer.device),
        "commit": trainer.commit,
    }


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that an interruption cut is left out."""
    lines = (folder / LOG).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None if it is not finished."""
    path = folder / RESULT
    return read_json(path) if path.exists() else None


def _check_settings(folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{folder} holds a run with {name}={theirs.get(name)!r}, not {ours.get(name)!r}; choose another folder"
            )


def _parts(graphs: Sequence[Graph], size: int) -> list[Sequence[Graph]]:
    return [graphs[start : start + size] for start in range(0, len(graphs), size)]
