"""Loss and score of node predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._errors import InvalidValue
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
    """The score in [0, 1] of predictions `[N, K]` for classes `[N]` or yes-no labels `[N, K]`, NaN where not known.

    - `accuracy`: the share of nodes whose largest logit is that of their class.
    - `f1`: 2 TP / (2 TP + FP + FN) over all known labels of all tasks; a logit above 0 is a yes.
    - `rocauc`: the probability that a yes has a larger logit than a no (a tie counts half); the mean over the tasks
      that have both.

    Raises:
        InvalidValue: a logit is not finite, or what is asked for is not defined for these labels. No number is made up.
    """
    if not bool(logits.isfinite().all()):
        raise InvalidValue("predictions must be finite, got NaN or infinity")
    if metric == "accuracy":
        return int((logits.argmax(1) == y).sum()) / len(y)
    if y.dim() == 1:
        logits, y = (logits[:, 1] - logits[:, 0]).unsqueeze(1), y.unsqueeze(1).double()
    known = ~y.isnan()
    if metric == "f1":
        said, true = logits[known] > 0, y[known] > 0
        wrong = int((said != true).sum())
        hits = int((said & true).sum())
        if hits + wrong == 0:
            raise InvalidValue("the F1 score is not defined where neither predictions nor labels hold a yes")
        return 2 * hits / (2 * hits + wrong)
    tasks = zip(logits.unbind(1), y.unbind(1), known.unbind(1), strict=True)
    areas = [_area(task[k], truth[k] > 0) for task, truth, k in tasks if len(truth[k].unique()) == 2]
    if not areas:
        raise InvalidValue("the area under the ROC curve is not defined where no task has both a yes and a no")
    return sum(areas) / len(areas)


def _area(logits: Float[Tensor, " n"], true: Shaped[Tensor, " n"]) -> float:
    """The area under the ROC curve by the ranks of the yeses (Mann and Whitney), ties at their mean rank."""
    _, place, counts = torch.unique(logits, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts.double() - 1) / 2)[place]
    yes, no = int(true.sum()), int((~true).sum())
    return (float(ranks[true].sum()) - yes * (yes + 1) / 2) / (yes * no)
