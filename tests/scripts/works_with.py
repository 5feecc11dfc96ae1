"""Write `docs/works_with.md` from the table that `tests/frameworks` checks cell by cell."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "frameworks"))
    import page

    (ROOT / "docs" / "works_with.md").write_text(page.write())


if __name__ == "__main__":
    main()
