"""Data sets: the embedded one against its own statement, files in the real formats, and broken files."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from randbatch.train.data import DATASETS, GroupsOptions, load_dataset, make_groups
from randbatch.train.data.graph import pick_split, random_masks
from randbatch.train.data.ogb import OGB_DATASETS


def tiny_arrays(num_nodes: int = 20, splits: int = 10) -> dict[str, np.ndarray]:
    """The arrays of the heterophilous-graphs benchmark, small."""
    rng = np.random.default_rng(0)
    pairs = np.stack([rng.permutation(num_nodes // 2) % 3 for _ in range(splits)])  # both classes have every role
    roles = pairs.repeat(2, axis=1)
    return {
        "node_features": rng.normal(size=(num_nodes, 4)).astype(np.float32),
        "node_labels": np.arange(num_nodes) % 2,
        "edges": np.stack([np.arange(num_nodes - 1), np.arange(1, num_nodes)], axis=1),
        "train_masks": roles == 0,
        "val_masks": roles == 1,
        "test_masks": roles == 2,
    }


# The embedded data set


def test_groups_is_what_it_says() -> None:
    options = GroupsOptions(num_nodes=3000, num_groups=4, train_graphs=6, val_graphs=2, test_graphs=3, noise=0.1)
    data = make_groups(0, options)
    roles = [(bool(g.train.all()), bool(g.val.all()), bool(g.test.all())) for g in data.graphs]
    assert roles == [(True, False, False)] * 6 + [(False, True, False)] * 2 + [(False, False, True)] * 3
    right, bits = [], []
    for graph in data.graphs:
        # with so little noise the groups can be read off the features exactly: cluster by nearest seen feature
        features = graph.x[:, :8]
        group = torch.full((3000,), -1)
        while (group < 0).any():
            seed = int((group < 0).nonzero()[0])
            group[(features - features[seed]).norm(dim=1) < 1.0] = int(group.max()) + 1
        assert int(group.max()) + 1 == 4
        source, target = graph.edge_index
        assert (group[source] != group[target]).all()  # no edge joins two members
        for g in range(4):
            assert len(graph.y[group == g].unique()) == 1  # the label is the group's bit
            bits.append(int(graph.y[group == g][0]))
        right.append(((graph.x[:, 8] > 0) == graph.y.bool()).float().mean())
    assert torch.stack(right).mean().item() == pytest.approx(0.6, abs=0.015)
    assert 0 < sum(bits) < len(bits)


def test_groups_depends_on_the_seed_only() -> None:
    options = GroupsOptions(num_nodes=50, train_graphs=2, val_graphs=1, test_graphs=1)
    state = torch.get_rng_state()
    first, again, other = (make_groups(seed, options).graphs[0] for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.edge_index, again.edge_index)
    assert not torch.equal(first.x, other.x)
    assert torch.equal(state, torch.get_rng_state())


# Names and splits


@pytest.mark.unchecked
def test_unknown_names_and_splits() -> None:
    with pytest.raises(ValueError, match=r"dataset must be one of .* Did you mean 'tolokers'\?"):
        load_dataset("tolokrs", Path("data"))
    with pytest.raises(ValueError, match="Did you mean 'roman-empire'"):
        load_dataset("Roman_Empire", Path("data"))
    with pytest.raises(ValueError, match="split must be at least 0"):
        load_dataset("groups", Path("data"), -1)
    with pytest.raises(TypeError, match="split must be an int"):
        load_dataset("groups", Path("data"), 0.5)  # type: ignore[arg-type]
    assert {"tolokers", "minesweeper", "pubmed", "computers", "wikics", "actor", "physics"} < set(DATASETS)


def test_masks() -> None:
    masks = random_masks(100, 3)
    assert [int(mask.sum()) for mask in masks.values()] == [60, 20, 20]
    assert torch.stack(list(masks.values())).sum(0).eq(1).all()
    assert torch.equal(masks["val"], random_masks(100, 3)["val"])
    assert not torch.equal(masks["val"], random_masks(100, 4)["val"])
    several = {"train": torch.eye(4).bool(), "val": torch.eye(4).bool(), "test": torch.ones(4).bool()}  # as WikiCS
    assert pick_split("x", several, 2)["train"].tolist() == [False, False, True, False]
    assert pick_split("x", several, 2)["test"].all()
    with pytest.raises(ValueError, match=r"split must lie in 0 … 3 for 'x', got 4"):
        pick_split("x", several, 4)


# torch_geometric


def test_karate() -> None:
    data = load_dataset("karate", Path("data"), 1)
    assert data.graphs[0].x.shape == (34, 34)
    assert data.num_outputs == 4


@pytest.mark.parametrize("split", [0, 9])
def test_tolokers_from_its_file(tmp_path: Path, split: int) -> None:
    """The real loader on a small file in the real format."""
    raw = tmp_path / "tolokers" / "raw"
    raw.mkdir(parents=True)
    arrays = tiny_arrays()
    np.savez(raw / "tolokers.npz", **arrays)
    data = load_dataset("tolokers", tmp_path, split)
    graph = data.graphs[0]
    assert (data.metric, data.num_outputs, graph.edge_index.shape) == ("rocauc", 2, (2, 38))
    for role in ("train", "val", "test"):
        assert torch.equal(getattr(graph, role), torch.from_numpy(arrays[f"{role}_masks"][split]))
    with pytest.raises(ValueError, match=r"split must lie in 0 … 9 for 'tolokers', got 10"):
        load_dataset("tolokers", tmp_path, 10)


@pytest.mark.unchecked
def test_missing_files_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_geometric.datasets.heterophilous_graph_dataset as module

    def offline(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(module, "download_url", offline)
    with pytest.raises(
        FileNotFoundError, match=r"'questions' is not whole under .* could not be downloaded: no network"
    ):
        load_dataset("questions", tmp_path)


# OGB


def write_csv(path: Path, rows: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        np.savetxt(file, np.atleast_2d(rows.T).T, delimiter=",", fmt="%g")


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-proteins"])
def test_ogb_from_its_files(tmp_path: Path, name: str) -> None:
    """The real loader on small files in the real format, the second time from the pickle that ogb writes."""
    folder = tmp_path / name.replace("-", "_")
    raw, split = folder / "raw", folder / "split" / {"ogbn-arxiv": "time", "ogbn-proteins": "species"}[name]
    (folder / "processed").mkdir(parents=True)
    (folder / "RELEASE_v1.txt").touch()
    proteins = name == "ogbn-proteins"
    edges = np.array([[0, 1], [1, 2], [3, 2], [4, 0]])
    write_csv(raw / "edge.csv.gz", edges)
    write_csv(raw / "num-node-list.csv.gz", np.array([6]))
    write_csv(raw / "num-edge-list.csv.gz", np.array([4]))
    write_csv(raw / "node_year.csv.gz", np.arange(6))
    write_csv(raw / "node_species.csv.gz", np.arange(6))
    tasks = np.eye(6, 3)[[0, 3, 1, 4, 2, 5]]  # every role has a task with both a yes and a no
    write_csv(raw / "node-label.csv.gz", tasks if proteins else np.array([0, 2, 1, 0, 2, 1]))
    write_csv(
        raw / ("edge-feat.csv.gz" if proteins else "node-feat.csv.gz"), np.arange(8 if proteins else 12).reshape(-1, 2)
    )
    for role, chosen in (("train", [0, 1]), ("valid", [2, 3]), ("test", [4, 5])):
        write_csv(split / f"{role}.csv.gz", np.array(chosen))
    for _ in range(2):
        data = load_dataset(name, tmp_path)
        graph = data.graphs[0]
        assert graph.edge_index.shape == (2, 8)
        assert [int(mask.sum()) for mask in (graph.train, graph.val, graph.test)] == [2, 2, 2]
        assert (data.metric, data.num_outputs) == (("rocauc", 3) if proteins else ("accuracy", 3))
        if proteins:  # ogb lists each edge in both directions; node 0 has edges 0 and 3, of features (0, 1) and (6, 7)
            assert graph.x[0].tolist() == [3.0, 4.0]
        else:
            assert graph.y.tolist() == [0, 2, 1, 0, 2, 1]
    with pytest.raises(ValueError, match="split must be 0"):
        load_dataset(name, tmp_path, 1)


def test_every_ogb_name_is_known() -> None:
    import ogb.nodeproppred
    import pandas

    master = pandas.read_csv(Path(ogb.nodeproppred.__file__).with_name("master.csv"), index_col=0)
    assert set(OGB_DATASETS) <= set(master.columns)


def test_every_torch_geometric_class_exists() -> None:
    import inspect

    import torch_geometric.datasets

    from randbatch.train.data.pyg import PYG_DATASETS

    for class_name, options in PYG_DATASETS.values():
        parameters = inspect.signature(getattr(torch_geometric.datasets, class_name)).parameters
        assert set(options) <= set(parameters)


# npz


def test_npz(tmp_path: Path) -> None:
    arrays = tiny_arrays()
    np.savez(tmp_path / "mine.npz", **arrays)
    data = load_dataset(str(tmp_path / "mine.npz"), tmp_path, 3)
    assert (data.name, data.metric, data.num_outputs) == ("mine", "accuracy", 2)
    assert data.graphs[0].edge_index.shape == (2, 38)
    assert torch.equal(data.graphs[0].test, torch.from_numpy(arrays["test_masks"][3]))
    one = {name: array[0] if name.endswith("masks") else array for name, array in arrays.items()}
    np.savez(tmp_path / "one.npz", **one)
    assert torch.equal(
        load_dataset(str(tmp_path / "one.npz"), tmp_path).graphs[0].val, torch.from_numpy(arrays["val_masks"][0])
    )
    with pytest.raises(ValueError, match=r"split must lie in 0 … 0 for 'one.npz', got 1"):
        load_dataset(str(tmp_path / "one.npz"), tmp_path, 1)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("edges", None, r"lacks the array edges \[E, 2\]"),
        ("edges", np.zeros((2, 5), dtype=int), r"edges must be integers \[E, 2\], got shape \[2, 5\], dtype int64"),
        ("edges", np.full((1, 2), 99), "edges must join nodes 0 to 19, got node 99"),
        ("edges", np.full((1, 2), -1), "edges must join nodes 0 to 19, got node -1"),
        ("edges", np.zeros((4, 2)), r"edges must be integers \[E, 2\], got shape \[4, 2\], dtype float64"),
        ("node_features", np.zeros(20), r"node_features must be numbers \[N, F\], got shape \[20\]"),
        ("node_labels", np.zeros(19, dtype=int), r"node_labels must be integers \[N\] with N = 20, got shape \[19\]"),
        ("node_labels", np.full(20, -1), "node_labels must be classes >= 0, no more than there are nodes, got -1"),
        ("val_masks", np.zeros((10, 21), dtype=bool), r"val_masks must be bool \[S, N\] or \[N\] with N = 20"),
    ],
)
def test_broken_npz(tmp_path: Path, name: str, array: np.ndarray | None, message: str) -> None:
    arrays = tiny_arrays()
    arrays.pop(name) if array is None else arrays.update({name: array})
    path = tmp_path / "broken.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        load_dataset(str(path), tmp_path)


def test_truncated_npz(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_dataset(str(path), tmp_path)
    np.savez(path, **tiny_arrays())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an npz"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a whole npz file"):
            load_dataset(str(path), tmp_path)
