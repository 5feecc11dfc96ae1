"""The graph transformer: each part against torch_geometric or a limit."""

import pytest
import torch
from torch import Tensor

from randbatch.models import ATTENTIONS, CONVOLUTIONS, GraphTransformer
from randbatch.models.local import make_convolution, prepare_edges

N, F, K = 30, 5, 3


def graph(num_nodes: int = N) -> tuple[Tensor, Tensor]:
    """Features, and directed edges without repeats."""
    pairs = torch.randperm(num_nodes * num_nodes)[:100]
    pairs = pairs[pairs // num_nodes != pairs % num_nodes]
    return torch.randn(num_nodes, F), torch.stack([pairs // num_nodes, pairs % num_nodes])


@pytest.mark.parametrize("local", CONVOLUTIONS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("order", ["then", "beside"])
def test_every_combination_trains(local: str, attention: str, order: str) -> None:
    model = GraphTransformer(F, K, channels=16, layers=2, local=local, attention=attention, batch_size=8, order=order)
    x, edge_index = graph()
    model(x, edge_index).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    out = model.eval()(x, edge_index)
    assert out.shape == (N, K)
    assert torch.equal(out, model(x, edge_index))


@pytest.mark.parametrize("name", ["gcn", "sage", "gat", "gin"])
@pytest.mark.parametrize("sparse", [True, False])
def test_convolutions_are_torch_geometrics(name: str, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On our prepared edges a convolution gives what torch_geometric gives on `edge_index`, with its gradients."""
    from torch_geometric.nn import GCNConv

    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: sparse)
    conv = make_convolution(name, 16, 4)
    peer = conv
    if name == "gcn":
        peer = GCNConv(16, 16)
        peer.load_state_dict(conv.state_dict())
    _, edge_index = graph()
    edges = prepare_edges(name, edge_index, N)
    assert (edges[0].layout == torch.sparse_csr) == (sparse and name != "gat")
    x = torch.randn(N, 16, requires_grad=True)
    outs = [conv(x, *edges), peer(x, edge_index)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(out.sin().sum(), x)[0] for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_rba_in_one_batch_is_full() -> None:
    full = GraphTransformer(F, K, channels=16, attention="full", heads=2).double().eval()
    x, edge_index = graph()
    batch = torch.arange(N) % 3
    for rounds in (1, 2):
        rba = GraphTransformer(F, K, channels=16, attention="rba", heads=2, batch_size=N, rounds=rounds).double().eval()
        rba.load_state_dict(full.state_dict())
        for graphs in (None, batch):
            torch.testing.assert_close(rba(x.double(), edge_index, graphs), full(x.double(), edge_index, graphs))


def test_off_sees_only_neighbours_and_attention_sees_all() -> None:
    x, _ = graph()
    x.requires_grad_()
    no_edges = torch.zeros(2, 0, dtype=torch.int64)
    for attention, reach in (("off", 1), ("full", N), ("linear", N)):
        model = GraphTransformer(F, K, channels=16, attention=attention)
        (seen,) = torch.autograd.grad(model(x, no_edges)[0].sum(), x)
        assert int((seen.abs().sum(1) > 0).sum()) == reach


def test_layers_have_partitions_of_their_own() -> None:
    model = GraphTransformer(F, K, layers=4)
    assert len({layer.attention.randbatch_config.seed for layer in model.layers}) == 4
    assert [layer.attention.randbatch_config.seed for layer in model.layers] == [
        layer.attention.randbatch_config.seed for layer in GraphTransformer(F, K, layers=4).layers
    ]
    assert (
        model.layers[0].attention.randbatch_config.seed
        != GraphTransformer(F, K, layers=4, seed=1).layers[0].attention.randbatch_config.seed
    )


def test_graph_level() -> None:
    model = GraphTransformer(F, K, channels=16, level="graph", attention="full").eval()
    x, edge_index = graph()
    one = model(x, edge_index)
    assert one.shape == (1, K)
    two = model(torch.cat([x, x]), torch.cat([edge_index, edge_index + N], 1), torch.arange(2).repeat_interleave(N))
    torch.testing.assert_close(two, one.expand(2, K), rtol=1e-4, atol=1e-5)


def test_nodes_may_be_few() -> None:
    model = GraphTransformer(F, K, channels=16)
    no_edges = torch.zeros(2, 0, dtype=torch.int64)
    for num_nodes in (0, 1, 2):
        assert model(torch.randn(num_nodes, F), no_edges).shape == (num_nodes, K)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"local": "sgae"}, ValueError, "local must be one of .* Did you mean 'sage'"),
        ({"attention": "rbf"}, ValueError, "attention must be one of .* Did you mean 'rba'"),
        ({"order": "both"}, ValueError, "order must be one of"),
        ({"level": "edge"}, ValueError, "level must be one of"),
        ({"heads": 5}, ValueError, "channels must be a multiple of heads, got 64 and 5"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        ({"dropout": -0.1}, ValueError, "dropout must lie in"),
        ({"layers": 1.0}, TypeError, "layers must be an int"),
        ({"estimator": "best"}, ValueError, "estimator must be one of"),
    ],
)
def test_bad_settings(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GraphTransformer(F, K, **options)


@pytest.mark.unchecked
def test_bad_input() -> None:
    model = GraphTransformer(F, K)
    x, edge_index = graph()
    for arguments, error, message in (
        ((x[:, :3], edge_index), ValueError, r"x must have shape \[N, 5\], got \[30, 3\]"),
        ((x, edge_index.T), ValueError, r"edge_index must have shape \[2, E\]"),
        ((x, edge_index.int()), TypeError, "edge_index must be int64"),
        ((x, edge_index + N), ValueError, "edge_index must hold nodes 0 to 29, got"),
        ((x, edge_index - N), ValueError, "edge_index must hold nodes 0 to 29, got -"),
        ((x, edge_index, torch.zeros(3, dtype=torch.int64)), ValueError, r"batch must have shape \[30\]"),
    ):
        with pytest.raises(error, match=message):
            model(*arguments)
