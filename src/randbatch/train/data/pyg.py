"""torch_geometric's node-classification data sets, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from randbatch._optional import require
from randbatch.train.data.graph import Dataset, Graph, Metric, pick_split, random_masks
from randbatch.train.data.reading import check_regular_files, reading

__all__ = ["PYG_DATASETS", "load_pyg"]

PYG_DATASETS: dict[str, tuple[str, dict[str, Any]]] = {
    "actor": ("Actor", {}),
    "airports-brazil": ("Airports", {"name": "Brazil"}),
    "airports-europe": ("Airports", {"name": "Europe"}),
    "airports-usa": ("Airports", {"name": "USA"}),
    "amazon-ratings": ("HeterophilousGraphDataset", {"name": "Amazon-ratings"}),
    "amazonproducts": ("AmazonProducts", {}),
    "chameleon": ("WikipediaNetwork", {"name": "chameleon"}),
    "citeseer": ("Planetoid", {"name": "CiteSeer"}),
    "computers": ("Amazon", {"name": "Computers"}),
    "cora": ("Planetoid", {"name": "Cora"}),
    "cora-full": ("CitationFull", {"name": "Cora"}),
    "cora-ml": ("CitationFull", {"name": "Cora_ML"}),
    "cornell": ("WebKB", {"name": "Cornell"}),
    "cs": ("Coauthor", {"name": "CS"}),
    "dblp": ("CitationFull", {"name": "DBLP"}),
    "deezer-europe": ("DeezerEurope", {}),
    "facebook": ("FacebookPagePage", {}),
    "flickr": ("Flickr", {}),
    "genius": ("LINKXDataset", {"name": "genius"}),
    "github": ("GitHub", {}),
    "karate": ("KarateClub", {}),
    "lastfm-asia": ("LastFMAsia", {}),
    "minesweeper": ("HeterophilousGraphDataset", {"name": "Minesweeper"}),
    "penn94": ("LINKXDataset", {"name": "penn94"}),
    "photo": ("Amazon", {"name": "Photo"}),
    "physics": ("Coauthor", {"name": "Physics"}),
    "pubmed": ("Planetoid", {"name": "PubMed"}),
    "questions": ("HeterophilousGraphDataset", {"name": "Questions"}),
    "reddit": ("Reddit", {}),
    "reddit2": ("Reddit2", {}),
    "roman-empire": ("HeterophilousGraphDataset", {"name": "Roman-empire"}),
    "squirrel": ("WikipediaNetwork", {"name": "squirrel"}),
    "texas": ("WebKB", {"name": "Texas"}),
    "tolokers": ("HeterophilousGraphDataset", {"name": "Tolokers"}),
    "wikics": ("WikiCS", {}),
    "wisconsin": ("WebKB", {"name": "Wisconsin"}),
    "yelp": ("Yelp", {}),
}
"""Our name → the class in `torch_geometric.datasets` and its arguments beside `root`."""

_METRICS: dict[str, Metric] = {  # the rest are judged by accuracy
    "amazonproducts": "f1",
    "genius": "rocauc",
    "minesweeper": "rocauc",
    "questions": "rocauc",
    "tolokers": "rocauc",
    "yelp": "f1",
}
_NAMES_ITS_FOLDER = frozenset({"Airports", "Amazon", "CitationFull", "Coauthor", "HeterophilousGraphDataset",
                               "LINKXDataset", "Planetoid", "WebKB", "WikipediaNetwork"})  # fmt: skip


def load_pyg(name: str, root: Path, split: int) -> Dataset:
    """Load a data set of `PYG_DATASETS`, downloading it under `root` if it is not there.

    Edges are made undirected. Where the data set has splits, `split` is one of them; where it has none, it is the seed
    of a random split, 60 % train, 20 % val, 20 % test. A node without a label (−1) has no role.

    torch_geometric unpickles files under `root`, which runs any code that lies there: load from a folder of your own.

    Raises:
        MissingExtra: torch_geometric is not installed.
        MissingFile: the files are not under `root` and cannot be downloaded.
        InvalidValue: there is no such split, or the files are damaged.
    """
    class_name, options = PYG_DATASETS[name]
    dataset_class = getattr(require("torch_geometric.datasets"), class_name)
    to_undirected = require("torch_geometric.utils").to_undirected
    folder = root if class_name in _NAMES_ITS_FOLDER else root / name  # the others would share `raw/`
    if class_name == "KarateClub":  # part of torch_geometric: no files
        data = dataset_class()[0]
    else:
        check_regular_files(root, options["name"] if folder == root else name)
        with reading(name, folder):
            data = dataset_class(root=str(folder), **options)[0]
    with reading(name, folder):
        y = data.y.squeeze(1) if data.y.dim() == 2 and data.y.shape[1] == 1 else data.y
        several = y.dim() == 2
        masks = _masks(name, data, split)
        if not several:
            masks = {role: mask & (y >= 0) for role, mask in masks.items()}
        edge_index = to_undirected(data.edge_index, num_nodes=data.num_nodes)
        graph = Graph(data.x.float(), edge_index, y.float() if several else y.long(), **masks)
        num_outputs = y.shape[1] if several else int(y.max()) + 1
        return Dataset(name, (graph,), _METRICS.get(name, "accuracy"), num_outputs)


def _masks(name: str, data: Any, split: int) -> dict[str, Tensor]:
    masks: dict[str, Any] = {role: data.get(f"{role}_mask") for role in ("train", "val", "test")}
    if any(mask is None for mask in masks.values()):
        return random_masks(data.num_nodes, split)
    return pick_split(name, masks, split)
