"""Write the golden values of `tests/golden_cases.py`, or compare this code with them (`--check`).

Run it on one thread, at a commit whose numbers are to be kept. Cases that cannot be computed here keep what they have.
"""

import argparse
import collections
import fnmatch
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden_cases import CASES, why_not
from golden_tools import FOLDER, Case, compare, compute, read, record, worst, write


def write_all(chosen: list[Case]) -> None:
    """Replace the values of these cases, and drop those of cases that are no more."""
    files = {path: read(path) for path in {case.file for case in CASES.values()}}
    for case in chosen:
        files[case.file][case.name] = record(case)
    for path, goldens in files.items():
        write({name: goldens[name] for name in CASES if name in goldens and CASES[name].file == path}, path)
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{len(chosen)} cases written; all files: {size / 2**20:.2f} MiB")


def check_all(chosen: list[Case], as_json: bool) -> bool:
    """Compare; whether every case is within its noise."""
    files = {path: read(path) for path in {case.file for case in chosen}}
    counts: collections.Counter[str] = collections.Counter()
    problems: dict[str, list[str]] = {}
    for case in chosen:
        found = compare(case, files[case.file].get(case.name), compute(case))
        far = [str(each) for each in found if each.of_bound > 1]
        problems[case.name] = far
        kind = "fails" if far else "bits" if all(each.bits for each in found) else "noise"
        counts[kind] += 1
        if not as_json:
            print(f"{kind:5}  {case.name}" + ("" if kind == "bits" else f"  ({worst(found)})"), flush=True)
    if as_json:
        print(json.dumps(problems))
    else:
        print(f"{counts['bits']} the same bits, {counts['noise']} within noise, {counts['fails']} fail")
    return not counts["fails"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--only", default="*", help="a pattern of names of cases, as 'layer: *rounds 3*'")
    parser.add_argument("--json", action="store_true", help="with --check: print by case what is beyond its noise")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    named = [case for case in CASES.values() if fnmatch.fnmatchcase(case.name, arguments.only)]
    chosen = [case for case in named if why_not(case) is None]
    for case in named:
        if case not in chosen and not arguments.json:
            print(f"left out: {case.name}: {why_not(case)}")
    if arguments.check:
        return 0 if check_all(chosen, arguments.json) else 1
    write_all(chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
