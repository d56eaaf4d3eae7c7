"""What every configuration of a published size needs of devices: the table of docs/plan.md.

    python benchmarks/plan.py                            # compiles what has no row yet, then writes the table
    python benchmarks/plan.py --topologies h200:8        # for other devices
    python benchmarks/plan.py --only 1.3b/32k --again    # what contains this in its name, made anew
    python benchmarks/plan.py --only none                # only writes the table

Needs the extra `plan`. Each row is compiled in a process of its own, one after the other, which takes up to some
minutes and GiB of memory here; Ctrl-C keeps the rows that are finished, in benchmarks/plan.jsonl.
"""

import json
import math
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tyro

from tttlm.cli.arguments import parse
from tttlm.planning.plan import make_plan
from tttlm.planning.topologies import only_compile
from tttlm.progress import progress_bar
from tttlm.training.config import TrainConfig
from tttlm.training.devices import DEVICES, GIB

ROOT = Path(__file__).parents[1]
ROWS, PAGE = ROOT / "benchmarks" / "plan.jsonl", ROOT / "docs" / "plan.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
MODELS = (
    *("ttt_linear_mamba", "ttt_mlp_mamba", "transformer", "mamba", "mamba2"),
    *("ttt_linear_transformer", "ttt_mlp_transformer"),
)
NAMES = [
    f"{size}/{context}{model}"
    for size in ("1.3b", "760m", "350m", "125m")
    for context in ("", "32k/")
    for model in MODELS
]

Row = dict[str, Any]


@dataclass(frozen=True)
class Arguments:
    """Compiles configurations for topologies."""

    topologies: tuple[str, ...] = ("v5e:4x8", "h200:8")
    only: str = ""
    """Compile only what contains this in its name."""
    again: bool = False
    """Compile what has a row already, too."""


def main(arguments: Arguments) -> None:
    """Compiles what is missing, then writes the table."""
    rows = read_rows()
    wanted = [(name, topology) for topology in arguments.topologies for name in NAMES if arguments.only in name]
    missing = [one for one in wanted if arguments.again or one not in rows]
    context = get_context("spawn")
    with progress_bar(len(missing), "compiling", unit="row") as bar:
        for name, topology in missing:
            bar.set_postfix_str(f"{name} for {topology}")
            with ProcessPoolExecutor(1, mp_context=context) as process:
                rows[name, topology] = process.submit(compile_row, name, topology).result()
            write_rows(rows)
            bar.update(1)
    write_table(rows)


def compile_row(name: str, topology: str) -> Row:
    """The plan of one configuration, and what made it. Where devices are more than rows, they share each row."""
    only_compile()
    arguments = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
    config = parse(TrainConfig, arguments, prog="benchmarks/plan.py")
    devices = math.prod(map(int, topology.partition(":")[2].split("x")))
    flags = [f"--mesh.context {devices // config.batch_size}"] if devices > config.batch_size else []
    config = parse(TrainConfig, [*arguments, *" ".join(flags).split()], prog="benchmarks/plan.py")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    versions = {package: version(package) for package in ("jax", "libtpu", "jax-cuda12-plugin")}
    plan = make_plan(config, topology)
    return {
        "config": name,
        "topology": topology,
        "flags": flags,
        **plan.as_dict(),
        **versions,
        "commit": commit.stdout.strip(),
    }


def read_rows() -> dict[tuple[str, str], Row]:
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {(row["config"], row["topology"]): row for row in map(json.loads, lines)}


def write_rows(rows: dict[tuple[str, str], Row]) -> None:
    part = ROWS.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    part.replace(ROWS)


def write_table(rows: dict[tuple[str, str], Row]) -> None:
    """Between its marks in the page: one table for each topology."""
    lines = []
    for topology in sorted({topology for _, topology in rows}, reverse=True):
        here = [rows[name, topology] for name in NAMES if (name, topology) in rows]
        device = next(device for device in DEVICES if device.name == topology.partition(":")[0])
        compiler = "libtpu" if "x" in topology else "jax-cuda12-plugin"
        made = [
            f"{package} {', '.join(sorted({row[package] for row in here}))}" for package in ("jax", compiler, "commit")
        ]
        lines += [
            f"### {topology}",
            "",
            f"{here[0]['devices']} devices of {device.memory / GIB:.1f} GiB; {'; '.join(made)}.",
            "",
            "| configuration | parameters | FLOPs a token | peak memory | state | exchanged a step | compiled in | |",
            "|---|---|---|---|---|---|---|---|",
            *map(table_row, here),
            "",
        ]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text("\n".join([before + BEGIN, *lines, END]) + rest.partition(END)[2])


def table_row(row: Row) -> str:
    peak, state, exchanged = f"{row['peak'] / GIB:.2f} GiB", "", ""
    if row["state"] is None:  # the compiler gave up
        peak = f"more than {peak}"
    else:
        state = f"{row['state'] / GIB:.2f} GiB"
        exchanged = f"{sum(one['bytes'] for one in row['collectives']) / GIB:,.0f} GiB"
    cells = [
        " ".join([f"`{row['config']}`", *(f"`{flag}`" for flag in row["flags"])]),
        f"{row['parameters'] / 1e6:,.0f} M",
        f"{row['flops_per_token'] / 1e9:.2f} G",
        *(peak, state, exchanged),
        f"{row['seconds']:.0f} s",
        "fits" if row["fits"] else "**does not fit**",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
