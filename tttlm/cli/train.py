"""`train.py`: trains a run and scores it on held-out text."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tttlm.cli.arguments import parse, program, run_command, take_option
from tttlm.cli.faults import Terminated, describe
from tttlm.errors import InputError
from tttlm.training.config import TrainConfig

if TYPE_CHECKING:  # it imports JAX
    from tttlm.evaluation.run import Run

DESCRIPTION = """Trains a language model, or resumes a run.

Start with:  python train.py --config configs/quickstart.yaml
--config FILE reads a YAML file of the fields below; flags on the command line override it.
--plan v5e:4x8 trains nothing: it compiles the step for 32 TPUs (h200:8 for 8 GPUs), which this machine need not have,
and says whether it fits. It needs no data.
--explain trains nothing: it prints how every parameter and optimiser state is sharded over the devices of `mesh`."""


FINISHED = "the run is finished and its checkpoints are kept"


def main(arguments: list[str]) -> int:
    """Trains; at the end scores the run on held-out text, draws its loss curve and prints a sample."""
    topology, arguments = take_option(arguments, "--plan", "a topology, as in --plan v5e:4x8 or --plan h200:8")
    rest = [argument for argument in arguments if argument != "--explain"]
    config = parse(TrainConfig, rest, prog=program("train.py"), description=DESCRIPTION)
    if len(rest) < len(arguments) and topology:
        raise InputError(f"--explain and --plan {topology} are both given: give one of them")
    if len(rest) < len(arguments):
        from tttlm.planning.explain import explain

        print("\n".join(explain(config)))
        return 0
    if topology:
        return plan(config, topology)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # a failed checkpoint is reported in one line
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    from tttlm.training.cluster import is_first, join, say

    join(config.distributed)
    from tttlm.training.loop import train

    outcome = train(config)
    say(outcome.message)
    if outcome.reason == "finished":
        # Every process scores, because none may exit before the others; process 0 prints.
        with contextlib.nullcontext() if is_first() else silence():
            conclude(config)
    return outcome.status


def plan(config: TrainConfig, topology: str) -> int:
    """Prints the memory that the run needs on devices that this machine does not have; returns 1 if it does not fit."""
    from tttlm.planning.plan import describe, make_plan
    from tttlm.planning.topologies import only_compile

    only_compile()
    planned = make_plan(config, topology)
    print("\n".join(describe(planned)))
    return 0 if planned.fits else 1


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """A context in which nothing is printed."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def conclude(config: TrainConfig) -> None:
    """Prints the results of a finished run. An error is reported and does not change the exit status."""
    try:
        from tttlm.evaluation.run import load_run

        run = load_run(config.run)
        text = not config.data.generated.tasks
        if text:
            _part("held-out score", lambda: print_score(run, config.evaluate.final_bytes))
        _part("loss curve", lambda: print_curve(run))
        if text:
            _part("sample", lambda: print_sample(run))
    except Terminated:
        print(f"stopped by SIGTERM; {FINISHED}", file=sys.stderr)
    except Exception as error:
        print(describe(error, FINISHED)[0] or FINISHED, file=sys.stderr)


def _part(name: str, work: Callable[[], None]) -> None:
    """Prints one part of the results; an error in it does not prevent the others."""
    try:
        work()
    except BrokenPipeError:
        raise
    except Exception as error:
        print(f"no {name}: {describe(error, FINISHED)[0].removeprefix('error: ')}", file=sys.stderr)


def print_score(run: "Run", limit: int) -> None:
    """Prints the loss on about `limit` bytes of held-out text; 0 prints none."""
    if limit:
        score = run.score_held_out(limit=limit)
        print(f"\nheld-out text   {score.bytes / 1e6:.2f} MB, {score.tokens:,} tokens")
        print(f"loss            {score.loss:.4f} nats per token")
        print(f"perplexity      {score.perplexity:.2f}")
        print(f"bits per byte   {score.bits_per_byte:.3f}")
        print(f"gzip -9         {run.held_out_gzip(limit):.3f} bits per byte of the same text, files joined")


def print_curve(run: "Run") -> None:
    """Draws the loss curve and prints its path."""
    from tttlm.evaluation.plots import loss_curve
    from tttlm.training.cluster import is_first

    picture = loss_curve(run.folder.metrics, run.folder.path / "loss.png") if is_first() else None
    print(f"loss curve      {picture}")


def print_sample(run: "Run") -> None:
    """Prints the beginning of a held-out document and the model's continuation."""
    prompt, written = run.sample()
    print(f"\nheld-out text begins:\n\n{prompt}\n\nthe model writes:\n\n{written}")


def run() -> None:
    kept = "prepared data and checkpoints are kept: the same command resumes"
    run_command(lambda: main(sys.argv[1:]), kept=kept)


if __name__ == "__main__":
    run()
