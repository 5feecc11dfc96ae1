"""Files: only regular ones are read and replaced, and what is read is what was written."""

import json
import os
from pathlib import Path

import pytest
from damage import line_of

from randbatch import _files
from randbatch._errors import InvalidValue
from randbatch._files import append_text, open_regular, read_json, read_record, write_bytes, write_json, write_record


def test_only_regular_files_are_read_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    for name, kind in (
        ("fifo", "a FIFO"),
        ("link", "a symbolic link"),
        ("folder", "a folder"),
        ("/dev/null", "a device"),
    ):
        path = tmp_path / name
        for call in (
            lambda path=path: write_bytes(path, b"x"),
            lambda path=path: write_json(path, {}),
            lambda path=path: read_json(path),
        ):
            assert f"must be a regular file, it is {kind}" in (line_of(call, tmp_path) or "")
        assert line_of(lambda path=path: append_text(path, "x"), tmp_path) is not None or name == "/dev/null"
    with open_regular(tmp_path / "link", links=True) as file:  # data may lie elsewhere
        assert file.read() == b"{}"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "new" / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "file").stat().st_mode & 0o777 == mode


def test_a_file_and_its_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content before the move, the folder after it, and the folder above a new folder."""
    synced: list[Path] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_bytes(tmp_path / "new" / "file", b"x")
    assert [synced[0], synced[2]] == [tmp_path, tmp_path / "new"]
    assert synced[1].parent == tmp_path / "new"
    assert len(synced) == 3


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """Written as null, so that any reader of JSON takes it; refused where somebody else wrote them."""
    path = tmp_path / "a.json"
    write_json(path, {"nan": float("nan"), "list": [float("inf"), 1.5, (float("-inf"),)]})
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"nan": None, "list": [None, 1.5, [None]]}
    for text in ("NaN", "[Infinity]", "-Infinity", "1e999", "{", "[" * 100_000, '"\udcff"', "9" * 5000):
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert line_of(lambda: read_json(path), tmp_path) is not None, text[:20]


def test_records_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {"a": 0.1 + 0.2, "b": [1, None, "ä"], "c": {"d": True}}
    write_record(path, content)
    assert read_record(path) == content
    text = path.read_text()
    for old, new in (("0.30000000000000004", "0.3"), ("true", "false"), ('"c"', '"e"')):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(InvalidValue, match="was changed since it was written"):
            read_record(path)
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidValue, match="is no record of randbatch"):
        read_record(path)


def test_files_are_documented_by_their_module() -> None:
    """Every writer of the package goes through `_files`."""
    package = Path(_files.__file__).parent
    for path in package.rglob("*.py"):
        if path.name in ("_files.py", "_folders.py", "build.py", "machine.py"):  # a compiler's cache; /proc
            continue
        text = path.read_text()
        for word in (".write_text(", ".write_bytes(", 'open("w', 'open("a', ".savefig("):
            assert word not in text or path.name == "frames.py", f"{path} writes a file by itself"
