"""Loss and score of node predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._optional import require
from randbatch._shapes import Float, Shaped
from randbatch.train.data import Metric

__all__ = ["loss", "score"]


def loss(logits: Float[Tensor, "n k"], y: Shaped[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Cross-entropy for classes `[N]`; binary cross-entropy for yes-no labels `[N, K]`, missing ones (NaN) left out."""
    if y.dim() == 1:
        return F.cross_entropy(logits, y)
    known = ~y.isnan()
    return F.binary_cross_entropy_with_logits(logits[known], y[known])


def score(metric: Metric, logits: Float[Tensor, "n k"], y: Shaped[Tensor, "n ..."]) -> float:
    """The score in [0, 1] of predictions `[N, K]` for classes `[N]` or yes-no labels `[N, K]`."""
    functional = require("torchmetrics.functional.classification")
    if metric == "accuracy":
        value = functional.multiclass_accuracy(logits, y, num_classes=logits.shape[1], average="micro")
    elif metric == "f1":
        value = functional.multilabel_f1_score(logits, y.long(), num_labels=y.shape[1], average="micro")
    elif y.dim() == 1:
        value = functional.binary_auroc(logits[:, 1] - logits[:, 0], y)
    else:
        known = ~y.isnan()
        tasks = zip(logits.unbind(1), y.unbind(1), known.unbind(1), strict=True)
        value = torch.stack([functional.binary_auroc(task[k], truth[k].long()) for task, truth, k in tasks]).mean()
    return float(value)
