"""Files that are whole or not there: written beside their place, then moved."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["read_json", "write_bytes", "write_json", "write_picture", "write_text"]


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; an interruption leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Replace `path` by a text in one step."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by a JSON document in one step."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_picture(path: Path, figure: Any) -> None:
    """Replace `path` by a PNG of a matplotlib figure in one step."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_bytes(path, content.getvalue())


def read_json(path: Path) -> Any:
    """Read a JSON document; a `ValueError` names the file that is not one."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
