"""Small faults in the source, one at a time: does a test notice?

    python tests/scripts/mutate.py --check                        the tests of each part pass, and how long they take
    python tests/scripts/mutate.py --limit 150                    an even sample of all parts
    python tests/scripts/mutate.py --part partition --jobs 2      all mutants of one part
    python tests/scripts/mutate.py --ids FILE:LINE:COLUMN:OPERATOR …
    python tests/scripts/mutate.py --report                       tables and survivors of what was run

Parts are written in `mutation/parts.toml`: files, and the tests that must notice a fault in them. Results are appended
to `--out`; a run that was stopped goes on where it was, and a file that has changed begins anew. A survivor is killed
by a better test, or answered by a sentence in `mutation/survivors.toml`. The exit code is 0 if no survivor is open.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutation import results
from mutation.making import mutants_of, sample
from mutation.server import Job, Outcome, preload, run
from mutation.source import Mutant, Source, read_signatures

HERE = Path(__file__).resolve().parent
_MANY_TIMES = 4
_CHECK_SECONDS = 300.0
_SLOWEST = 3


@dataclass(frozen=True)
class Part:
    """Files, and the tests that must notice a fault in them."""

    name: str
    sources: Mapping[str, Source]
    tests: Sequence[str]
    leave_out: str

    def mutants(self) -> list[Mutant]:
        return [mutant for source in self.sources.values() for mutant in mutants_of(source)]

    def job(self, root: Path, timeout: float, mutant: Mutant | None = None, known: Outcome | None = None) -> Job:
        replaced = None
        if mutant is not None:
            replaced = str(root / mutant.file), self.sources[mutant.file].apply(mutant.edit)
        durations = {} if known is None else known.durations
        return Job(root, self.tests, self.leave_out, timeout, replaced, durations, mutant)


def read_parts(config: Path, root: Path) -> tuple[list[str], dict[str, Part]]:
    """Modules to load first, and parts; a `ValueError` where a file is in two of them or a pattern fits no file."""
    tables = tomllib.loads(config.read_text())
    modules = tables.pop("preload", [])
    signatures = read_signatures(sorted((root / "src").rglob("*.py")))
    parts: dict[str, Part] = {}
    for name, table in tables.items():
        files = _find(root, table["files"], name)
        twice = [file for file in files for part in parts.values() if file in part.sources]
        if twice:
            raise ValueError(f"a file belongs to one part, but these of {name!r} are in another: {twice}")
        sources = {file: Source(file, (root / file).read_bytes(), signatures) for file in files}
        parts[name] = Part(name, sources, _find(root, table["tests"], name), table.get("leave_out", ""))
    return modules, parts


def _find(root: Path, patterns: Sequence[str], part: str) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        path, colons, test = pattern.partition("::")
        files = sorted(str(file.relative_to(root)) for file in root.glob(path))
        if not files:
            raise ValueError(f"part {part!r}: there is no file {path!r} below {root}")
        found += [file + colons + test for file in files if file + colons + test not in found]
    return found


def check(part: Part, root: Path) -> Outcome:
    """The tests of a part on the source as it is; a `RuntimeError` where they do not pass."""
    ((_, outcome),) = run([part.job(root, _CHECK_SECONDS)])
    if outcome.status != "passed":
        raise RuntimeError(
            f"the tests of {part.name!r} do not pass by themselves ({outcome.status}):\n{outcome.output}"
        )
    print(f"{part.name}: {len(outcome.durations)} tests pass in {outcome.seconds:.1f} s", flush=True)
    slowest = sorted(outcome.durations.items(), key=lambda each: -each[1])[:_SLOWEST]
    print("\n".join(f"    {seconds:.1f} s  {test}" for test, seconds in slowest), flush=True)
    return outcome


def run_part(
    part: Part, mutants: Sequence[Mutant], root: Path, options: argparse.Namespace
) -> Iterator[tuple[Mutant, Outcome]]:
    """Check the part's tests, then run them on each mutant."""
    known = check(part, root)
    timeout = _MANY_TIMES * known.seconds + options.grace
    for job, outcome in run((part.job(root, timeout, mutant, known) for mutant in mutants), options.jobs):
        yield job.label, outcome


def to_record(part: str, mutant: Mutant, outcome: Outcome) -> results.Record:
    status = {"passed": "survived", "failed": "killed"}.get(outcome.status, outcome.status)
    return {
        "id": mutant.name,
        "part": part,
        "status": status,
        "seconds": round(outcome.seconds, 2),
        "test": outcome.test,
        "before": mutant.before,
        "after": mutant.after,
        "source": mutant.digest,
        **({"output": outcome.output} if status == "error" else {}),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="only this part; may be repeated")
    parser.add_argument("--ids", nargs="+", default=[], help="only these mutants")
    parser.add_argument("--limit", type=int, help="an even sample of about so many over files and operators")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="processes side by side (default 1)")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="STATUS", help="run these again: survived, timeout, …"
    )
    parser.add_argument(
        "--grace", type=float, default=10.0, help="seconds that a mutant has beside 4 times those of the tests"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="only run the tests of each part on the source as it is")
    what.add_argument("--list", action="store_true", help="only name the mutants")
    what.add_argument("--report", action="store_true", help="only print what was found so far")
    what.add_argument("--questions", action="store_true", help="print open survivors as tables for the file of answers")
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="the repository")
    parser.add_argument("--config", type=Path, default=HERE / "mutation" / "parts.toml")
    parser.add_argument("--answers", type=Path, default=HERE / "mutation" / "survivors.toml")
    parser.add_argument("--out", type=Path, default=None, help="default: build/mutants.jsonl in the repository")
    return parser.parse_args(arguments)


def choose(made: Mapping[str, Sequence[Mutant]], options: argparse.Namespace) -> dict[str, list[Mutant]]:
    """The mutants that were asked for, by part; a `ValueError` for names that there are not."""
    unknown = set(options.part or ()) - set(made)
    if unknown:
        raise ValueError(f"--part must be one of {list(made)}, got {sorted(unknown)}")
    made = {name: mutants for name, mutants in made.items() if not options.part or name in options.part}
    every = [mutant for mutants in made.values() for mutant in mutants]
    if options.ids:
        missing = set(options.ids) - {mutant.name for mutant in every}
        if missing:
            raise ValueError(f"--ids: there are no such mutants (see --list): {sorted(missing)}")
    chosen = {mutant.name for mutant in sample(every, options.limit) if not options.ids or mutant.name in options.ids}
    return {name: [mutant for mutant in mutants if mutant.name in chosen] for name, mutants in made.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    root = options.root.resolve()
    out = options.out or root / "build" / "mutants.jsonl"
    modules, parts = read_parts(options.config, root)
    made = {name: part.mutants() for name, part in parts.items()}
    chosen = choose(made, options)
    answers = results.read_answers(options.answers)
    if options.list:
        for mutant in (mutant for mutants in chosen.values() for mutant in mutants):
            print(f"{mutant.name}\n    - {mutant.before}\n    + {mutant.after}")
        return 0
    if not (options.report or options.questions):
        preload(modules, root)
        run_all(parts, chosen, root, out, options)
        if options.check:
            return 0
    records = results.read_records(out)
    every = [mutant for mutants in chosen.values() for mutant in mutants]
    found = results.latest(records, every)
    states = [results.state_of(mutant, found, answers) for mutant in every]
    if options.questions:
        asked = [mutant for mutant, state in zip(every, states, strict=True) if state == "open"]
        print("\n\n".join(results.write_question(mutant) for mutant in asked))
    else:
        print(results.report(chosen, records, answers))
        stale = results.find_stale(answers, (mutant for mutants in made.values() for mutant in mutants))
        print("\n".join(["", f"Answers that fit no mutant: {len(stale)}", *stale]))
    return int("open" in states or "error" in states)


def run_all(
    parts: Mapping[str, Part],
    chosen: Mapping[str, Sequence[Mutant]],
    root: Path,
    out: Path,
    options: argparse.Namespace,
) -> None:
    """Run what has no result yet, part by part, and append the results."""
    for name, mutants in chosen.items():
        if options.check:
            check(parts[name], root)
            continue
        found = results.latest(results.read_records(out), mutants)
        again = {mutant_name for mutant_name, record in found.items() if record["status"] in options.again}
        left = [mutant for mutant in mutants if mutant.name not in found or mutant.name in again]
        outcomes = run_part(parts[name], left, root, options) if left else ()
        for number, (mutant, outcome) in enumerate(outcomes, 1):
            record = to_record(name, mutant, outcome)
            results.append_record(out, record)
            line = f"[{number}/{len(left)}] {record['status']} {outcome.seconds:.1f} s {mutant.name} {outcome.test}"
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
