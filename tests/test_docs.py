"""Every example in the README and the documentation runs."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    """The blocks of a page run one after the other, as a reader would."""
    names: dict[str, object] = {}
    for block in examples(page):
        exec(compile(block, str(page), "exec"), names)


def test_there_are_examples() -> None:
    assert len(examples(ROOT / "README.md")) >= 3
    assert len(examples(ROOT / "docs" / "guide.md")) >= 6


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_picture_is_drawn_by_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("draw_idea", ROOT / "docs" / "draw_idea.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert matplotlib.get_backend().lower() == "agg"
    monkeypatch.setattr(module, "__file__", str(tmp_path / "draw_idea.py"))
    module.main()
    assert (tmp_path / "idea.png").stat().st_size > 10_000


def test_the_core_needs_torch_alone() -> None:
    """Importing randbatch imports no optional package, and a missing one is explained."""
    code = """
import sys
names = "torch_geometric tyro tqdm matplotlib safetensors jaxtyping ogb ot transformers timm"
for name in names.split():
    sys.modules[name] = None  # as if it were not installed
import torch, randbatch as rb
rb.nn.RandomBatchAttention(8, 2, 4)(torch.randn(9, 8)).sum().backward()
rb.convert(model := torch.nn.TransformerEncoderLayer(8, 2), 4)
model(torch.randn(9, 1, 8))
try:
    rb.conversion.hf.register(4)
except ImportError as error:
    print(error)
rb.particles.solve(rb.particles.consensus(), torch.randn(9, 2), 1.0, 0.5, batch_size=3)
try:
    rb.particles.w2(torch.randn(9, 2), torch.randn(9, 2))
except ImportError as error:
    print(error)
rb.models.GraphTransformer(3, 2, local="off")(torch.randn(9, 3), torch.zeros(2, 0, dtype=torch.int64))
try:
    rb.models.GraphTransformer(3, 2, local="gcn")
except ImportError as error:
    print(error)
from randbatch.cli import main
raise SystemExit(main(["datasets"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "this needs transformers: pip install 'randbatch[hf]'" in done.stdout
    assert "this needs ot: pip install 'randbatch[particles]'" in done.stdout
    assert "this needs torch_geometric: pip install 'randbatch[graph]'" in done.stdout
    assert done.returncode == 2
    assert "randbatch: this needs tyro: pip install 'randbatch[train]'" in done.stderr
