"""``python -m bench train``, ``compile``, ``verify``: measure, print a table, store the result as JSON."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.compile_time import first_steps, giant, growth, verification
from bench.machine import description
from bench.rivals import RIVALS
from bench.statistics import spread
from bench.train import measure

RESULTS = Path(__file__).parent / "results"
ORDER = ",".join(RIVALS)


def _train(options: argparse.Namespace) -> dict[str, Any]:
    rivals = options.rivals.split(",")
    unknown = [name for name in rivals if name not in RIVALS]
    if unknown:
        raise SystemExit(f"unknown rival {unknown[0]}; choose from {', '.join(RIVALS)}")
    found = measure(rivals, options.world, options.rounds, options.steps)
    table = Table("rival", "step ms", "quartiles", *(f"of {name}" for name in options.against.split(",")))
    for name, each in found["seconds"].items():
        ratios = [
            found["ratios"][other][name] if other in found["ratios"] else None for other in options.against.split(",")
        ]
        shown = [f"{r['median']:.3f} ({r['low']:.3f}–{r['high']:.3f})" if r else "" for r in ratios]
        table.add_row(name, f"{each['median'] * 1e3:.0f}", f"{each['low'] * 1e3:.0f}–{each['high'] * 1e3:.0f}", *shown)
    for name, why in found["missing"].items():
        table.add_row(name, "missing", why)
    apart = found["largest_loss_difference"]
    Console(width=140).print(table, f"largest difference of a loss from {found['reference']}'s:")
    Console(width=140).print(", ".join(f"{name} {each:.1e}" for name, each in apart.items()))
    return found


def _compile(options: argparse.Namespace) -> dict[str, Any]:
    seconds = growth((8, 16, 32, 64), options.rounds)
    medians = {depth: asdict(spread(each)) for depth, each in seconds.items()}
    steps, large = first_steps(8), giant()
    table = Table("layers", "seconds", "quartiles", "ratio to half the layers")
    for depth, each in medians.items():
        ratio = f"{each['median'] / medians[depth // 2]['median']:.2f}" if depth // 2 in medians else ""
        table.add_row(str(depth), f"{each['median']:.2f}", f"{each['low']:.2f}–{each['high']:.2f}", ratio)
    Console().print(table, {"first step, 8 layers": steps, "405B shape on 1,024 ranks": large})
    return {"growth": medians, "first_steps": steps, "giant": large}


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    shares = {depth: asdict(spread(each)) for depth, each in verification((8, 64), options.rounds).items()}
    table = Table("layers", "verifier's share of compile time", "quartiles")
    for depth, each in shares.items():
        table.add_row(str(depth), f"{each['median']:.1%}", f"{each['low']:.1%}–{each['high']:.1%}")
    Console().print(table)
    return {"share": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="step times of all rivals")
    train.add_argument("--rivals", default=ORDER)
    train.add_argument("--against", default="ddp,fsdp2")
    train.add_argument("--world", type=int, default=2)
    train.add_argument("--rounds", type=int, default=8)
    train.add_argument("--steps", type=int, default=5)
    train.add_argument("--result", default="train", help="the result is stored as results/NAME.json")
    train.set_defaults(run=_train)
    compiling = commands.add_parser("compile", help="compile times")
    compiling.add_argument("--rounds", type=int, default=3)
    compiling.add_argument("--result", default="compile")
    compiling.set_defaults(run=_compile)
    verifying = commands.add_parser("verify", help="the verifier's share of compile time")
    verifying.add_argument("--rounds", type=int, default=3)
    verifying.add_argument("--result", default="verify")
    verifying.set_defaults(run=_verify)
    options = parser.parse_args()
    found = {
        "machine": description(),
        "options": {k: v for k, v in vars(options).items() if k != "run"},
        **options.run(options),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.result}.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
