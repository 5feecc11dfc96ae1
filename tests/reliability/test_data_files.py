"""Data that cannot be trained on, and files that are damaged: one sentence from every loader, and no number."""

import io
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import DAMAGES, line_of
from interrupting import write_data

from randbatch._errors import InvalidValue
from randbatch.train.data import Dataset, Graph, load_dataset
from randbatch.train.data.graph import pick_split

DAMAGES_OF_ONE_FILE = {name: damage for name, damage in DAMAGES.items() if name != "swap"}


def graph(**changes: Any) -> Graph:
    """Twelve nodes on a path, two classes, every role with both."""
    number = torch.arange(12)
    role = number // 2 % 3
    whole = {
        "x": torch.ones(12, 3),
        "edge_index": torch.stack([number[:-1], number[1:]]),
        "y": number % 2,
        "train": role == 0,
        "val": role == 1,
        "test": role == 2,
    }
    return Graph(**(whole | changes))


def with_value(tensor: torch.Tensor, index: Any, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


NONE = torch.zeros(12, dtype=torch.bool)
GOOD = graph()
TASKS = torch.stack([GOOD.y.float(), torch.full((12,), torch.nan)], dim=1)


# What a data set is, wherever it comes from


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": with_value(GOOD.x, (5, 1), torch.nan)}, "features must be finite in float32, node 5 has nan"),
        ({"x": with_value(GOOD.x, (7, 0), -torch.inf)}, "features must be finite in float32, node 7 has -inf"),
        ({"x": GOOD.x.double()}, r"features must be float32 \[N, F\].*, got float64 \[12, 3\]"),
        ({"x": GOOD.x[:, :0]}, r"features must be .* N and F at least 1 .*, got float32 \[12, 0\]"),
        ({"edge_index": GOOD.edge_index + 1}, "edges must join nodes 0 to 11, got node 12"),
        ({"edge_index": GOOD.edge_index - 1}, "edges must join nodes 0 to 11, got node -1"),
        ({"edge_index": GOOD.edge_index.float()}, r"edges must be int64 \[2, E\], got float32 \[2, 11\]"),
        ({"edge_index": GOOD.edge_index.T}, r"edges must be int64 \[2, E\], got int64 \[11, 2\]"),
        ({"y": with_value(GOOD.y, 0, 2)}, "labels must be 0 to 1, got 2"),
        ({"y": with_value(GOOD.y, 0, -1)}, "labels must be 0 to 1, got -1"),
        ({"y": GOOD.y[:11]}, r"labels must be int64 \[12\], got int64 \[11\]"),
        ({"y": GOOD.y.float()}, r"labels must be int64 \[12\], got float32 \[12\]"),
        ({"train": GOOD.train.long()}, r"the train mask must be bool \[12\], got int64 \[12\]"),
        ({"test": GOOD.test[:11]}, r"the test mask must be bool \[12\], got bool \[11\]"),
        ({"test": GOOD.test | GOOD.train}, "no node may be both train and test, node 0 and 4 in all are"),
        ({"val": GOOD.val | GOOD.test}, "no node may be both val and test, node 4 and 4 in all are"),
        ({"train": NONE}, "there must be train nodes, got none"),
        ({"val": NONE}, "there must be val nodes, got none"),
        ({"test": NONE}, "there must be test nodes, got none"),
        ({"train": GOOD.train & (GOOD.y == 1)}, "train nodes must be of two classes at least, all are of class 1"),
    ],
)
def test_what_cannot_be_trained_on(changes: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InvalidValue, match=rf"data set 'x': {message}"):
        Dataset("x", (graph(**changes),), "accuracy", 2)


@pytest.mark.unchecked
def test_what_cannot_be_judged() -> None:
    with pytest.raises(InvalidValue, match="at least one graph"):
        Dataset("x", (), "accuracy", 2)
    with pytest.raises(InvalidValue, match="classes must be at least 2 and no more than the 12 nodes, got 13"):
        Dataset("x", (GOOD,), "accuracy", 13)
    with pytest.raises(InvalidValue, match="classes must be at least 2 and no more than the 12 nodes, got 1"):
        Dataset("x", (graph(y=torch.zeros(12, dtype=torch.int64)),), "accuracy", 1)
    one_class = with_value(GOOD.y, GOOD.val, 1)
    Dataset("x", (graph(y=one_class),), "accuracy", 2)
    with pytest.raises(InvalidValue, match="val nodes must be of two classes at least, all are of class 1"):
        Dataset("x", (graph(y=one_class),), "rocauc", 2)  # it has no area under its curve
    Dataset("x", (graph(y=TASKS),), "rocauc", 2)  # the second task is known of nobody
    with pytest.raises(InvalidValue, match=r"labels must be 0, 1 or NaN \(not known\), got 2.0"):
        Dataset("x", (graph(y=with_value(TASKS, (3, 0), 2)),), "rocauc", 2)
    with pytest.raises(InvalidValue, match="there must be known labels of test nodes, got none"):
        Dataset("x", (graph(y=with_value(TASKS, GOOD.test, torch.nan)),), "f1", 2)
    with pytest.raises(InvalidValue, match=r"labels must be floating-point \[12, 3\], got float32 \[12, 2\]"):
        Dataset("x", (graph(y=TASKS),), "f1", 3)
    with pytest.raises(InvalidValue, match="features of graph 1 must be float32"):
        Dataset("x", (GOOD, graph(x=torch.ones(12, 2))), "accuracy", 2)
    unlabelled = with_value(GOOD.y, 0, -1)  # a node without a role needs no label
    Dataset("x", (graph(y=unlabelled, train=with_value(GOOD.train, 0, False)),), "accuracy", 2)


@pytest.mark.parametrize(
    ("mask", "value"),
    [(2 * GOOD.train.long() - 1, "-1"), (torch.arange(12), "2"), (GOOD.train.float() / 2, "0.5"),
     (with_value(GOOD.train.float(), 0, torch.nan), "nan"), (GOOD.train.to(torch.uint8) * 255, "255")],
)  # fmt: skip
def test_masks_are_of_0_and_1(mask: torch.Tensor, value: str) -> None:
    masks = {"train": mask, "val": GOOD.val, "test": GOOD.test.long()}
    with pytest.raises(InvalidValue, match=rf"'?x'?: train_mask must be a mask of 0 and 1, it holds {value}"):
        pick_split("x", masks, 0)
    assert torch.equal(pick_split("x", masks | {"train": GOOD.train.long()}, 0)["test"], GOOD.test)


def test_fingerprints() -> None:
    """Equal for equal numbers, another one for any number that changes."""
    first = Dataset("x", (GOOD,), "accuracy", 2).fingerprint
    assert first == Dataset("other name", (graph(),), "accuracy", 2).fingerprint
    changes: list[dict[str, torch.Tensor]] = [
        {"x": with_value(GOOD.x, (5, 1), 1 + 2**-23)},
        {"edge_index": GOOD.edge_index.flip(0)},
        {"y": 1 - GOOD.y},
        {"train": GOOD.test, "test": GOOD.train},
    ]
    others = {Dataset("x", (graph(**change),), "accuracy", 2).fingerprint for change in changes}
    others |= {Dataset("x", (GOOD,), "rocauc", 2).fingerprint, Dataset("x", (GOOD,), "accuracy", 3).fingerprint}
    assert len(others | {first}) == 7


# npz


@pytest.mark.parametrize("damage", DAMAGES_OF_ONE_FILE)
def test_damaged_npz(tmp_path: Path, damage: str) -> None:
    """One line, or a data set whose every number passed a check of its own (a flipped bit may miss the arrays)."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "g.npz"
    write_data(path)
    right = load_dataset(str(path), tmp_path).fingerprint
    DAMAGES_OF_ONE_FILE[damage](path, random.Random(damage))
    found: list[str] = []
    line = line_of(lambda: found.append(load_dataset(str(path), tmp_path).fingerprint), tmp_path)
    assert line is not None or found == [right]


@pytest.mark.parametrize("name", ["node_features", "node_labels", "edges", "train_masks"])
def test_strange_arrays(tmp_path: Path, name: str) -> None:
    """Other shapes, dtypes and values in place of each array."""
    path = tmp_path / "g.npz"
    write_data(path)
    with np.load(path) as file:
        whole = dict(file)
    strange: list[np.ndarray] = [
        np.array(None), np.array([{}] * 60, dtype=object), np.array(["a"] * 60), np.zeros(60, dtype="datetime64[s]"),
        np.zeros(60, dtype=complex), np.zeros(()), np.zeros(0), np.zeros((0, 0)), np.zeros((60, 0)),
        np.zeros((1, 60, 1)), np.zeros(60, dtype=[("a", int)]), np.full((60, 4), np.nan), np.full((60, 4), 1e300),
        np.full(60, 2**63, np.uint64), np.full((59, 2), 2**63, np.uint64), np.full(60, -1), 2 * np.arange(60),
        np.full(60, 255, np.uint8), np.zeros(60, "V0"),
    ]  # fmt: skip
    for array in strange:
        np.savez(path, **(whole | {name: array}))
        line = line_of(lambda: load_dataset(str(path), tmp_path), tmp_path)
        assert line is not None, f"{array.dtype} {array.shape} was taken for {name}"
        assert "g" in line
    big_endian = {key: array.astype(array.dtype.newbyteorder(">")) for key, array in whole.items()}
    np.savez(tmp_path / "big.npz", **big_endian)
    np.savez(path, **whole)
    found = [load_dataset(str(p), tmp_path).fingerprint for p in (path, tmp_path / "big.npz")]
    assert found[0] == found[1]


def test_sizes_that_are_only_claimed(tmp_path: Path) -> None:
    """A header that says terabytes takes no memory."""
    path = tmp_path / "g.npz"
    write_data(path)
    with np.load(path) as file:
        whole = dict(file)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in whole.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array)
            text = content.getvalue()
            if name == "node_features":
                text = text.replace(b"(60, 4)", b"(60, 4000000000)"[:16]).replace(b"                ", b"       ", 1)
            archive.writestr(f"{name}.npy", text)
    assert "is not a whole npz file" in (line_of(lambda: load_dataset(str(path), tmp_path), tmp_path) or "")


def test_an_npz_may_lie_elsewhere(tmp_path: Path) -> None:
    write_data(tmp_path / "g.npz")
    (tmp_path / "link.npz").symlink_to(tmp_path / "g.npz")
    files = [str(tmp_path / name) for name in ("g.npz", "link.npz")]
    assert len({load_dataset(name, tmp_path).fingerprint for name in files}) == 1


# torch_geometric and ogb


@pytest.fixture(scope="module")
def pyg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in torch_geometric's format, processed."""
    root = tmp_path_factory.mktemp("pyg")
    raw = root / "tolokers" / "raw"
    raw.mkdir(parents=True)
    write_data(raw / "tolokers.npz")
    with np.load(raw / "tolokers.npz") as file:
        arrays = dict(file)
    masks = {name: np.stack([array] * 10) for name, array in arrays.items() if name.endswith("masks")}
    np.savez(raw / "tolokers.npz", **(arrays | masks))
    load_dataset("tolokers", root)
    return root


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch_geometric leaves files open
@pytest.mark.parametrize("damage", DAMAGES_OF_ONE_FILE)
def test_damaged_torch_geometric(pyg: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its files, processed or raw; what unpickling raises is one line that names the folder."""
    import torch_geometric.datasets.heterophilous_graph_dataset as module

    def offline(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(module, "download_url", offline)
    right = load_dataset("tolokers", pyg).fingerprint
    files = sorted(path.relative_to(pyg) for path in pyg.rglob("*") if path.is_file())
    assert len(files) == 4  # raw, processed, and what they were processed with
    for file in files:
        root = tmp_path / file.name
        shutil.copytree(pyg, root)
        if file.parts[1] == "raw":
            shutil.rmtree(root / "tolokers" / "processed")
        if not (root / file).exists():
            continue
        DAMAGES_OF_ONE_FILE[damage](root / file, random.Random(f"{damage} {file}"))
        found: list[str] = []
        # the library writes `processed/` itself: whether that stays as it was is not ours
        line = line_of(
            lambda root=root, found=found: found.append(load_dataset("tolokers", root).fingerprint), tmp_path / "none"
        )
        if line is not None:
            assert "tolokers" in line
        elif not damage.startswith("flip"):  # a flipped bit of a feature in a file without checksums is another feature
            assert found == [right], f"{damage} of {file}"


def test_ogb_is_one_line(tmp_path: Path) -> None:
    """A pickle that is none, one that raises, one of something else, and a FIFO."""
    processed = tmp_path / "ogbn_arxiv" / "processed"
    processed.mkdir(parents=True)
    (tmp_path / "ogbn_arxiv" / "RELEASE_v1.txt").touch()
    file = processed / "data_processed"
    for content in (b"", b"junk", pickle.dumps([1, 2]), pickle.dumps({"graph": 1})):
        file.write_bytes(content)
        assert "'ogbn-arxiv'" in (line_of(lambda: load_dataset("ogbn-arxiv", tmp_path), tmp_path) or "")
    torch.save({"graph": {"num_nodes": 3}, "labels": None}, file)
    assert "'ogbn-arxiv'" in (line_of(lambda: load_dataset("ogbn-arxiv", tmp_path), tmp_path) or "")
    file.unlink()
    os.mkfifo(file)
    assert "must be a regular file" in (line_of(lambda: load_dataset("ogbn-arxiv", tmp_path), tmp_path) or "")
