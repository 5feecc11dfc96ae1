"""Is the error that `choose_rounds` states honest? Random problems of all families, against exact attention.

Run `python benchmarks/tolerance.py`; about two minutes an estimator.
"""

import argparse
import statistics

import torch
from _families import FAMILIES, make
from _measure import write_row

import randbatch as rb
from randbatch.estimators import ESTIMATORS


def one_problem(number: int, estimator: str) -> dict:
    """Stated and true relative error of one problem; all it is made of depends on its number."""
    generator = torch.Generator().manual_seed(number)

    def draw(*choices: float) -> float:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    name = list(FAMILIES)[number % len(FAMILIES)]
    sharpness, p, tolerance = draw(0.5, 1, 2, 3), int(draw(16, 32, 64, 128)), draw(0.03, 0.1, 0.3)
    num_tokens = int(torch.randint(1000, 4000, (), generator=generator))
    inputs = make(name, sharpness, num_tokens, 16, seed=number)
    choice = rb.choose_rounds(*inputs, p, tolerance, estimator=estimator, seed=number)
    exact = rb.full_attention(*inputs)
    out = rb.random_batch_attention(*inputs, batch_size=p, rounds=choice.rounds, estimator=estimator, seed=number)
    true = ((out - exact).norm() / exact.norm()).item()
    problem = f"{name} {sharpness:g}, N = {num_tokens}, p = {p}, tolerance {tolerance:g}"
    return {"problem": problem, "rounds": choice.rounds, "stated": choice.error, "true": true}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200)
    options = parser.parse_args()
    for estimator in ESTIMATORS:
        found = [one_problem(number, estimator) for number in range(options.problems)]
        missed = [row for row in found if row["true"] > row["stated"]]
        ratio = statistics.median(row["stated"] / row["true"] for row in found)
        held = 1 - len(missed) / len(found)
        print(f"\n{estimator}: held in {held:.1%} of {len(found)}; stated / true in the median {ratio:.2f}")
        for row in sorted(missed, key=lambda row: row["stated"] / row["true"]):
            print(f"  {row['problem']}: {row['rounds']} rounds, stated {row['stated']:.4f}, true {row['true']:.4f}")
        write_row(
            "tolerance",
            {"estimator": estimator, "problems": len(found), "held": held, "stated_by_true": ratio, "missed": missed},
        )


if __name__ == "__main__":
    main()
