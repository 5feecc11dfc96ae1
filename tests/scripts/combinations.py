"""Random combinations of all options against the oracle, more of them than `tests/test_combinations.py` runs.

    python tests/scripts/combinations.py --count 2000 --seed 1

Prints what fails, with the call, and ends with 1 if anything did. `--only 17` runs one of them, and shows where it
fails; `--compiled` those under `torch.compile` instead, with a line of JSON for each; `--choose 94` says which of
`--count` combinations cover the most: `combination_cases.NUMBERS`.
"""

import argparse
import json
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any


def outcome(check: Callable[[Any], bool], case: Any) -> str:
    """`agreed`, `refused`, or what went wrong."""
    try:
        return "refused" if check(case) else "agreed"
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"


def traits(case: Any) -> set[Any]:
    """Every two options of a case."""
    options = {name: value for name, value in vars(case).items() if name not in ("number", "n", "p", "d", "dv")}
    options |= {"few": min(case.n, 3), "wider": case.d != case.dv, "autocast": case.computed != case.stored}
    return {*combinations(options.items(), 2)}


def path(case: Any) -> tuple[Any, ...]:
    """What decides how attention is computed."""
    half = case.computed.itemsize == 2
    batches = max(-(-case.n // case.p), 1)
    wide = case.rounds_of_call == 1 and case.n // batches >= 16  # torch's fused attention on a CPU begins there
    several = case.rounds_of_call > 1
    return case.interaction, case.estimator, several, wide, case.chunk_batches is None, case.drops, half


def choose(number: int, cases: list[Any]) -> list[int]:
    """One case that each rule alone refuses; one of each path, with several batches and gradients; and the most unlike.

    Of those that would do it is the one that has the most pairs of options which no other has.
    """
    from combination_entries import Entry
    from combination_rules import RULES, is_split

    refused: dict[str, int] = {}
    served: dict[int, Any] = {}
    telling: dict[int, Any] = {}
    for case in cases:
        entry = Entry(case)
        rules = [rule.reason for rule in RULES if rule.holds(case, entry)]
        if len(rules) == 1 and entry.num_tokens > 1:
            refused.setdefault(rules[0], case.number)
        elif not rules:
            served[case.number] = case
            several = is_split(case, entry) and case.rounds_of_call * (case.p - 1) < entry.largest - 1
            if several and case.entry != "wrapper" and case.mode in ("backward", "second"):
                telling[case.number] = case
    chosen, covered = list(refused.values()), set[Any]()

    def take(candidates: dict[int, Any]) -> Any:
        best = max(candidates.values(), key=lambda each: len(traits(each) - covered))
        covered.update(traits(best))
        chosen.append(best.number)
        del served[best.number]
        return best

    while telling:
        of_path = path(take(telling))
        telling = {each: case for each, case in telling.items() if path(case) != of_path}
    while len(chosen) < number:
        take(served)
    return sorted(chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, help="how many combinations; default: those of the test")
    parser.add_argument("--seed", type=int, default=0, help="of the combinations; 0 are those of the test; default 0")
    parser.add_argument("--only", type=int, help="the number of the one combination to run")
    parser.add_argument("--compiled", action="store_true", help="run those under torch.compile")
    parser.add_argument("--choose", type=int, help="how many to choose of the combinations, without running them")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it where kernels are defined; there need not be a GPU
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    from combination_cases import COMPILED, NUMBERS, draw
    from combination_checks import check

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for torchs_own in ("`torch.jit.script` is deprecated", ".* should not be instantiated"):
        warnings.filterwarnings("ignore", torchs_own, DeprecationWarning)
    if options.compiled:
        for case in COMPILED:
            print(json.dumps([case.number, outcome(check, case)]), flush=True)
        return 0
    if options.only is not None:
        case = draw(options.only, options.seed)
        print(repr(case), "refused" if check(case) else "agreed", sep="\n")
        return 0
    if options.choose is not None:
        print(choose(options.choose, [draw(number, options.seed) for number in range(options.count)]))
        return 0
    found: Counter[str] = Counter()
    for number in NUMBERS if options.count is None else range(options.count):
        case = draw(number, options.seed)
        what = outcome(check, case)
        found[what if what in ("agreed", "refused") else "failed"] += 1
        if what not in ("agreed", "refused"):
            print(f"{number}: {case!r}\n{what}", flush=True)
    print(", ".join(f"{number} {what}" for what, number in sorted(found.items())))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
