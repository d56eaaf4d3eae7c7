"""`python -m tttlm.cli.plot`: plots metrics of one or several runs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tttlm.cli.arguments import parse, program, run_command
from tttlm.errors import InputError
from tttlm.fields import refuse_unused
from tttlm.ranges import FilePath, PicturePath

DESCRIPTION = """Plots metrics of runs.

For example:  python -m tttlm.cli.plot runs/a runs/b --of loss validation_loss --against tokens
              python -m tttlm.cli.plot runs/a --of "layer_*/inner_loss_after" "layer_00/drift_*"
              python -m tttlm.cli.plot runs/a --names"""


@dataclass(frozen=True)
class PlotConfig:
    """Configuration of a plot."""

    runs: tyro.conf.Positional[tuple[FilePath, ...]] = ()
    """The folders of runs."""
    of: tuple[str, ...] = ("loss",)
    """Names of metrics, each with a panel of its own; patterns with * and ? plot several in one panel."""
    against: Literal["step", "tokens", "flops", "seconds"] = "step"
    """The quantity of the horizontal axis."""
    log: bool = False
    """Use a logarithmic vertical axis."""
    png: PicturePath = ""
    """The picture to write; empty writes plot.png to the folder of the first run."""
    names: bool = False
    """List the names of all metrics, and plot nothing."""


def main(arguments: list[str]) -> int:
    config = parse(PlotConfig, arguments, prog=program("plot"), description=DESCRIPTION)
    if not config.runs:
        raise InputError("name the folders of runs, for example: python -m tttlm.cli.plot runs/quickstart --of loss")
    if not config.of:
        raise InputError("--of names at least one metric, for example --of loss")
    if config.names:
        refuse_unused(config, "with --names, which plots nothing", "of", "against", "log", "png")
    from tttlm.evaluation.curves import draw_curves, read_runs, summary

    runs = read_runs(config.runs)
    if config.names:
        print("\n".join(summary([name for run in runs for name in run.names])))
        return 0
    png = Path(config.png or Path(config.runs[0]) / "plot.png")
    if not png.parent.is_dir():
        raise InputError(f"--png {png}: there is no folder {png.parent}")
    print(draw_curves(runs, config.of, png, against=config.against, log=config.log))
    return 0


def run() -> None:
    run_command(lambda: main(sys.argv[1:]), kept="the runs are unchanged")


if __name__ == "__main__":
    run()
