"""Caches that somebody or something has damaged, and several processes at one cache.

Whatever happens, a call gives the right numbers, by a library that is whole and this user's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faking
import pytest
from faking import Place, begin, build_command, call, ended_well, in_child

from randbatch.kernels.cpu import build, cache, ops

pytestmark = faking.NEEDS_COMPILER
made, place = faking.made, faking.place

# Caches


def fill(place: Place) -> Path:
    """The library, kept."""
    assert call(place)
    (path,) = place.kept()
    begin()
    return path


def replaced(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**36)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.so")
    path.symlink_to(path.parent.parent / "elsewhere.so")


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def another(path: Path) -> None:
    """Whole by its name, but none that can be loaded."""
    path.unlink()
    content = b"of another machine"
    name = path.name.rsplit("-", 1)[0]
    path.with_name(f"{name}-{cache._digest(content)}.so").write_bytes(content)
    path.with_name(f"{name}-{cache._digest(content)}.so").chmod(0o600)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "all but a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "64 GB": sparse,
    "a link": linked,
    "a pipe": piped,
    "of another machine": another,
    "gone": lambda path: path.unlink(),
    "others may write": lambda path: path.chmod(0o666),
    "a group may write": lambda path: path.chmod(0o620),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_library_is_made_again(name: str, place: Place) -> None:
    DAMAGE[name](fill(place))
    assert call(place)
    assert place.compiled == 2
    assert not place.warned
    path = place.kept()[-1] if name != "of another machine" else next(p for p in place.kept() if cache._is_sound(p))
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    begin()
    assert call(place)
    assert place.compiled == 2, "what was made again was not kept"


def test_a_library_of_another_user_is_made_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(place)
    real = os.fstat
    monkeypatch.setattr(cache.os, "fstat", lambda handle: Owned(real(handle)))
    assert call(place)
    assert place.compiled == 2
    assert not place.warned


class Owned:
    """The status of a file, of somebody else."""

    def __init__(self, found: os.stat_result) -> None:
        self._found = found

    def __getattr__(self, name: str) -> int:
        return getattr(self._found, name) + (name == "st_uid")


def open_to_all(place: Place) -> None:
    place.cache.mkdir(parents=True)
    place.cache.chmod(0o777)


def open_to_a_group(place: Place) -> None:
    place.cache.mkdir(parents=True)
    place.cache.chmod(0o770)


def a_file(place: Place) -> None:
    place.cache.parent.mkdir()
    place.cache.write_text("")


def a_link_to_nowhere(place: Place) -> None:
    place.cache.parent.mkdir()
    place.cache.symlink_to(place.root / "nowhere")


FOLDERS: dict[str, tuple[Callable[[Place], None], str]] = {
    "open to all": (open_to_all, "others may write"),
    "open to a group": (open_to_a_group, "others may write"),
    "a file": (a_file, "cannot be made"),
    "a link to nowhere": (a_link_to_nowhere, "cannot be made"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_used(name: str, place: Place) -> None:
    spoil, reason = FOLDERS[name]
    spoil(place)
    assert call(place)
    assert not list(place.root.glob("cache/randbatch/*"))
    (text,) = place.warned
    assert reason in text and str(place.cache) in text


def test_what_lies_in_a_folder_open_to_all_is_not_run(place: Place) -> None:
    path = fill(place)
    (compiler,) = build_command()
    evil = f'#include <cstdio>\n__attribute__((constructor)) void run() {{ fclose(fopen("{place.root}/ran", "w")); }}'
    command = [compiler, "-x", "c++", "-shared", "-fPIC", "-o", str(path), "-"]
    subprocess.run(command, input=evil, text=True, check=True)
    path.rename(path.with_name(f"{path.name.rsplit('-', 1)[0]}-{cache._digest(path.read_bytes())}.so"))
    place.cache.chmod(0o777)
    assert call(place)
    assert not (place.root / "ran").exists()


def test_a_folder_of_another_user(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(place)
    monkeypatch.setattr(cache.os, "geteuid", lambda: 4321)
    assert call(place)
    (text,) = place.warned
    assert "belongs to another user" in text


def test_no_home(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cache.Path, "home", no_home)
    assert call(place)
    (text,) = place.warned
    assert "no home" in text


@pytest.mark.parametrize("home", ["", "relative"])
def test_a_home_that_is_nowhere(home: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home)
    assert call(place)
    assert len(place.warned) == 1
    assert not list(place.root.rglob("*.so"))


def test_a_relative_cache_counts_for_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert call(place)
    assert not place.warned
    assert not (place.root / "cache").exists()
    assert list((place.root / ".cache" / "randbatch").glob("*.so"))


def test_a_link_to_the_folder_is_followed(place: Place) -> None:
    real = place.root / "scratch"
    real.mkdir(mode=0o700)
    place.cache.parent.mkdir()
    place.cache.symlink_to(real)
    fill(place)
    assert call(place)
    assert place.compiled == 1
    assert not place.warned


def test_no_umask(place: Place) -> None:
    before = os.umask(0)
    try:
        path = fill(place)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.cache.stat().st_mode) == 0o700


def test_a_full_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_bytes", full)
    assert call(place)
    (text,) = place.warned
    assert "cannot be kept" in text and "No space" in text
    assert not place.kept()


def test_what_a_killed_process_left_is_removed(place: Place) -> None:
    place.cache.mkdir(parents=True, mode=0o700)
    place.cache.joinpath(".randbatch-0123456789abcdef").write_text("half")
    place.cache.joinpath("of-somebody").write_text("stays")
    fill(place)
    assert sorted(path.name[:6] for path in place.cache.iterdir()) == ["attent", "lock", "of-som"]


def test_everything_is_on_the_disk_before_it_counts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append("fsync"), real_sync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (seen.append("replace"), real_replace(self, to))[1])
    fill(place)
    assert seen[-3:] == ["fsync", "replace", "fsync"]


# Several processes


def is_built() -> None:
    assert ops.library_for(16, 16).why_not() is None


def test_several_processes_compile_once(place: Place) -> None:
    place.script(f"sleep 0.5; {place.copy('right')}")
    assert ended_well(*(in_child(is_built) for _ in range(4)))
    assert place.compiled == 1
    assert len(place.kept()) == 1


def test_a_process_that_holds_the_lock_for_ever(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def hold() -> None:
        with cache.locked(place.cache, 1.0):
            (place.root / "held").touch()
            time.sleep(60)

    place.cache.mkdir(parents=True, mode=0o700)
    pid = in_child(hold)
    while not (place.root / "held").exists():
        time.sleep(0.01)
    monkeypatch.setattr(build, "_SECONDS", 0.5)
    try:
        assert call(place)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(place.kept()) == 1


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_lock_that_is_none(kind: str, place: Place) -> None:
    place.cache.mkdir(parents=True, mode=0o700)
    lock = place.cache / "lock"
    lock.mkdir() if kind == "folder" else os.mkfifo(lock)
    fill(place)
    assert not place.warned


def test_a_forked_process_takes_nothing_away(place: Place) -> None:
    """Without a cache: what parent and child have loaded needs no file."""
    open_to_all(place)
    assert call(place)

    def leave() -> None:
        with contextlib.suppress(SystemExit):
            sys.exit(0)
        assert call(place)

    assert ended_well(in_child(leave))
    assert call(place)
    assert place.compiled == 1
