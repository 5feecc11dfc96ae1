"""Draw docs/idea.png: what random batch attention computes, layer after layer."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap

import randbatch as rb

NUM_TOKENS, BATCH_SIZE = 24, 6
COLORS = ["#d62728", "#1f77b4", "#2ca02c", "#ff9f1c"]


def batch_of(part: rb.Partition) -> np.ndarray:
    """The batch of each token."""
    batch = torch.empty(NUM_TOKENS, dtype=torch.int64)
    batch[part.index] = torch.arange(part.num_batches).unsqueeze(1).expand_as(part.index)
    return batch.numpy()


def meetings(batch: np.ndarray) -> np.ndarray:
    """The pairs that meet: the number of their batch, or nan."""
    same = batch[:, None] == batch[None, :]
    return np.where(same, batch[:, None].astype(float), np.nan)


def draw_pairs(axes: plt.Axes, pairs: np.ndarray, title: str, below: str) -> None:
    cmap = ListedColormap(COLORS)
    axes.imshow(pairs, cmap=cmap, vmin=-0.5, vmax=len(COLORS) - 0.5)
    axes.set_xticks(np.arange(-0.5, NUM_TOKENS), labels=[])
    axes.set_yticks(np.arange(-0.5, NUM_TOKENS), labels=[])
    axes.grid(color="#dddddd", linewidth=0.4)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(below, fontsize=9.5)


def main() -> None:
    first, second = (batch_of(rb.random_partition(NUM_TOKENS, BATCH_SIZE, seed=seed)) for seed in (1, 2))
    order = np.argsort(first, kind="stable")
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.9), layout="constrained")
    axes[0].imshow(np.full((NUM_TOKENS, NUM_TOKENS), 0.55), cmap="gray", vmin=0, vmax=1)
    axes[0].set(xticks=[], yticks=[])
    axes[0].set_title("full attention", fontsize=11)
    axes[0].set_xlabel("every token meets every token:\nN² pairs", fontsize=9.5)
    axes[0].set_ylabel("N tokens", fontsize=9.5)
    draw_pairs(axes[1], meetings(first), "layer 1: random batches", "a token meets the p tokens\nof its random batch")
    draw_pairs(
        axes[2], meetings(first[order]), "the same, in batch order", "M = N/p dense blocks, independent:\nN·p pairs"
    )
    draw_pairs(axes[3], meetings(second), "layer 2: new batches", "the batches are drawn anew\nin every layer")
    after_one = (first[:, None] == first[None, :]).astype(int)
    after_two = (second[:, None] == second[None, :]).astype(int) @ after_one > 0
    reach = np.where(after_one > 0, 0.0, np.where(after_two, 1.0, np.nan))
    axes[4].imshow(reach, cmap=ListedColormap(["#555555", "#b0b0b0"]), vmin=0, vmax=1)
    axes[4].set(xticks=[], yticks=[])
    axes[4].set_title("what a token knows", fontsize=11)
    share = np.mean(~np.isnan(reach))
    axes[4].set_xlabel(
        f"dark: after one layer; light: after two\n({share:.0%} of all pairs; depth mixes)", fontsize=9.5
    )
    path = Path(__file__).with_name("idea.png")
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
