"""``python -m tests.mutation``: the kill rate table, in Markdown, and every mutant that lives on."""

from tqdm import tqdm

from tests.mutation.mutators import MUTATORS
from tests.mutation.subjects import NAMES, subject
from tests.mutation.table import killed


def main() -> None:
    print("| program, two ranks | mutants | refused by the verifier |\n| --- | --- | --- |")
    survivors = []
    for name in tqdm(NAMES, desc="programs"):
        one = subject(name)
        row = {mutant: killed(mutant, one) for mutant in MUTATORS}
        flags = [flag for flag in row.values() if flag is not None]
        survivors += [f"{mutant} of {name}" for mutant, flag in row.items() if flag is False]
        tqdm.write(f"| {name} | {len(flags)} | {sum(flags)} |")
    print(f"survivors: {', '.join(survivors) or 'none'}")


if __name__ == "__main__":
    main()
