"""The runner of mutants, on a toy: what a test notices is killed, what none does survives, what never ends stops."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from mutation.making import mutants_of, sample  # noqa: E402
from mutation.source import Mutant, Source, read_signatures  # noqa: E402

TOY = '''"""A toy: 1 + 1."""

from __future__ import annotations

import math

__all__ = ["count"]


def count(number: int, step: int = 1) -> int:
    """Count down from 9 to 0."""
    if number > 1000:
        raise ValueError(f"at most {500 + 500}, got {number}")
    total = 0
    while number > 0:
        number -= step
        total += 1
    return total
'''
TEST = """from toy import count

def test_count():
    assert [count(n) for n in (0, 1, 5)] == [0, 1, 5]
"""
PARTS = """preload = []
[toy]
files = ["src/*.py"]
tests = ["tests/test_*.py"]
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name, text in (("src/toy.py", TOY), ("tests/test_toy.py", TEST), ("parts.toml", PARTS)):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    return tmp_path


def mutate(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    settings = ["--root", root, "--config", root / "parts.toml", "--answers", root / "answers.toml"]
    command = [sys.executable, SCRIPTS / "mutate.py", *settings, "--out", root / "out.jsonl", *options]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def statuses(root: Path) -> dict[str, str]:
    records = [json.loads(line) for line in (root / "out.jsonl").read_text().splitlines()]
    return {record["id"]: record["status"] for record in records}


def test_one_is_killed_one_survives_one_never_ends(toy: Path) -> None:
    killed, survivor = "src/toy.py:14:13:integer+1", "src/toy.py:12:17:integer+1"
    endless = "src/toy.py:16:16:arithmetic"  # number += step
    listed = mutate(toy, "--list")
    before = sorted(toy.rglob("*"))
    done = mutate(toy, "--ids", killed, survivor, endless, "--jobs", "2", "--grace", "2")
    assert all(name in listed.stdout for name in (killed, survivor, endless))
    assert statuses(toy) == {killed: "killed", survivor: "survived", endless: "timeout"}, done.stdout + done.stderr
    assert done.returncode == 1
    assert "- if number > 1000:\n    + if number > 1001:" in done.stdout
    assert sorted(path for path in toy.rglob("*") if path.name != "out.jsonl") == before  # the tree is as it was
    assert (toy / "src/toy.py").read_text() == TOY


def test_it_goes_on_where_it_was_and_takes_answers(toy: Path) -> None:
    survivor, killed = "src/toy.py:12:17:integer+1", "src/toy.py:14:13:integer+1"
    mutate(toy, "--ids", survivor)
    with (toy / "out.jsonl").open("a") as out:
        out.write('{"id": "src/toy.py:14')  # a run that was cut off
        out.write("\n")
    again = mutate(toy, "--ids", survivor, killed)
    assert "[1/1] killed" in again.stdout  # the first is known
    question = mutate(toy, "--questions", "--ids", survivor).stdout
    (toy / "answers.toml").write_text(question.replace('why = ""', 'why = "equivalent: nobody counts so far"'))
    answered = mutate(toy, "--report", "--ids", survivor, killed)
    assert answered.returncode == 0, answered.stdout
    assert "Open survivors: 0" in answered.stdout
    (toy / "src/toy.py").write_text("# lines move\n" + TOY)  # results are void, the answer holds
    moved = mutate(toy, "--ids", survivor.replace(":12:", ":13:"))
    assert moved.returncode == 0, moved.stdout
    assert "survived" in moved.stdout
    assert "Answers that fit no mutant: 0" in moved.stdout
    (toy / "src/toy.py").write_text(TOY.replace("> 1000", "> 2000"))
    assert "Answers that fit no mutant: 1" in mutate(toy, "--report").stdout


def test_tests_that_do_not_pass_or_import_nothing_are_told(toy: Path) -> None:
    (toy / "tests/test_toy.py").write_text("def test_nothing(): pass\n")
    done = mutate(toy, "--ids", "src/toy.py:14:13:integer+1")
    assert "error" in done.stdout
    assert done.returncode == 1
    (toy / "tests/test_toy.py").write_text(TEST.replace("5]", "6]"))
    done = mutate(toy, "--check")
    assert "the tests of 'toy' do not pass by themselves" in done.stderr
    assert done.returncode == 1


def made(text: str) -> list[Mutant]:
    return mutants_of(Source("a.py", text.encode(), {"own": frozenset({"flag"})}))


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("a < b", {"a <= b"}),
        ("(a) is not (b)", {"(a) is (b)"}),
        ("a not in b", {"a in b"}),
        ("a // b + c", {"a % b + c", "a // b - c"}),
        ("a @ b", set()),
        ("x = 0.9", {"x = 0.99"}),
        ("x = 3", {"x = 4", "x = 2"}),
        ("m = (1 << k) - j", {"m = (2 << k) - j", "m = (0 << k) - j", "m = (1 >> k) - j", "m = (1 << k) + j"}),
        ("x = True", {"x = False"}),
        ("a and b or c", {"a or b or c", "a and b and c"}),
        ("x = not a", {"x = a"}),
        ("if a: b()", {"if True: b()", "if False: b()", "if a: pass"}),
        ("while a: b = c", {"while False: b = c"}),
        ("x = [a for a in b if c]", {"x = [a for a in b if True]", "x = [a for a in b if False]"}),
        ("y = x[a:]", {"y = x[((a) + 1):]", "y = x[((a) - 1):]"}),
        ("y = x.amax()", {"y = x.amin()"}),
        ("y = (a @ b).detach()", {"y = (a @ b)"}),
        ("y = x.to(dtype)", {"y = x"}),
        ("y = own(a, flag=b, need=c)", {"y = own(a, need=c)"}),
        ("y = x.sum(keepdim=b)", {"y = x.sum()"}),
        ("y = torch.where(a, (b), c)", {"y = torch.where(a, (c), b)"}),
        ("F.dropout(x, problem.dropout_p)", {"pass", "F.dropout(x, (0.9 * problem.dropout_p))"}),
        ("def f(a: int = b) -> bool:\n return a", {"def f(a: int = b) -> bool:\n return (not (a))"}),
        ("y = f(\n a,\n dim=b\n)", {"y = f(\n a\n\n)"}),
        ("'1 + 1'", set()),
        ("def f(x: 'a < b'): 'a < 1'", set()),
        ("__all__ = ['a'] + b", set()),
        ("from a import b\nraise ValueError(f'{a + 1}')", set()),
        ("if TYPE_CHECKING:\n x = 1", set()),
        ("T = int | None", set()),
        ("zip(strict=True)", {"pass"}),
        ("@f(1)\nclass A(g(2)): pass", set()),
    ],
)
def test_what_becomes_of_a_line(text: str, becomes: set[str]) -> None:
    source = Source("a.py", text.encode(), {"own": frozenset({"flag"})})
    found = {source.apply(mutant.edit).decode() for mutant in mutants_of(source)}
    plain = {each.replace("problem.dropout_p if problem.dropout_p is None else ", "") for each in found}
    assert {each.replace("=  ", "= ") for each in plain} == becomes


def test_the_faults_that_were_seen_by_hand_are_among_the_mutants() -> None:
    assert "(1 << 23) - 1" in {mutant.after for mutant in made("(1 << 63) - 1")}
    assert any("0.9 * p.dropout_p" in mutant.after for mutant in made("y = F.dropout(w, p.dropout_p)"))


def test_every_mutant_of_the_package_is_a_program_of_as_many_lines() -> None:
    root = Path(__file__).parents[1]
    files = sorted((root / "src/randbatch/kernels").glob("*.py"))
    signatures = read_signatures(files)
    every: list[Mutant] = []
    for file in files:
        source = Source(str(file.relative_to(root)), file.read_bytes(), signatures)
        for mutant in mutants_of(source):
            changed = source.apply(mutant.edit)
            compile(changed, source.file, "exec")
            assert changed.count(b"\n") == source.data.count(b"\n")
            every.append(mutant)
    few, more = sample(every, 40), sample(every, 240)
    assert len(few) == 40
    assert {mutant.name for mutant in few} < {mutant.name for mutant in more}
    assert sample(every, None) == every
    assert {mutant.operator for mutant in more} == {mutant.operator for mutant in every}
