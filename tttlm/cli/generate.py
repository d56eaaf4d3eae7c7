"""`python -m tttlm.cli.generate`: generates text from a run or a released model, and streams it."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tttlm.cli.arguments import parse, program, run_command
from tttlm.errors import InputError
from tttlm.fields import refuse_unused
from tttlm.inference.sampling import Sampling
from tttlm.ranges import Count, CountOrZero, FilePath
from tttlm.training.config import MeshConfig

if TYPE_CHECKING:
    from tttlm.inference import Generation, Piece

DESCRIPTION = """Generates text after a prompt, after a saved state, or both.

For example:
  python -m tttlm.cli.generate runs/quickstart --prompt "Once upon a time"

Read a book once, and generate from its state any number of times:
  python -m tttlm.cli.generate runs/quickstart --prompt_file book.txt --save_state book.safetensors --max_tokens 0
  python -m tttlm.cli.generate runs/quickstart --load_state book.safetensors --prompt "And then" """


@dataclass(frozen=True)
class GenerateConfig(Sampling):
    """Configuration of generation."""

    model: tyro.conf.Positional[FilePath] = ""
    """The folder of a run or of a released model."""
    tokenizer: FilePath = ""
    """For a released model without a tokenizer in its folder: a tokenizer file, a folder with one, or "bytes"."""
    step: CountOrZero | None = None
    """The checkpoint of a run; None is the newest."""
    prompt: tuple[str, ...] = ()
    """The prompt; several prompts are processed as a batch."""
    prompt_file: FilePath = ""
    """A text file with the prompt, instead of --prompt."""
    max_tokens: CountOrZero = 128
    """Largest number of tokens of a sample; 0 only reads the prompt, for --save_state."""
    num_samples: Count = 1
    """Number of samples of each prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end a sample."""
    ignore_end: bool = False
    """Continue past the EOS."""
    save_state: FilePath = ""
    """A file for the state after the prompt."""
    load_state: FilePath = ""
    """A file of --save_state to continue from; the prompt follows the text that was read."""
    max_length: CountOrZero = 0
    """Length in tokens of the caches of attention; 0 takes that of the model's configuration."""
    chunk: Count = 512
    """Number of tokens of a prompt that are read at a time."""
    json: bool = False
    """Print JSON, with tokens and log-probabilities, at the end."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(fsdp=1))
    """Number of devices that the model is sharded over."""


def main(arguments: list[str]) -> int:
    config = parse(GenerateConfig, arguments, prog=program("generate"), description=DESCRIPTION)
    if not config.model:
        raise InputError("name a model, for example: python -m tttlm.cli.generate runs/quickstart --prompt 'The'")
    if config.prompt and config.prompt_file:
        raise InputError("--prompt and --prompt_file are both given: give one of them")
    if not (config.max_tokens or config.save_state):
        raise InputError("max_tokens = 0 only reads the prompt: name a file with --save_state, or raise it")
    if not config.max_tokens:
        unused = ("num_samples", "stop", "ignore_end", "json", *Sampling.__dataclass_fields__)
        refuse_unused(config, "with max_tokens = 0, which only reads the prompt", *unused)
    if config.temperature == 0:
        why = "with temperature = 0, which takes the most likely token"
        refuse_unused(config, why, "top_k", "top_p", "min_p", "num_samples")
    if config.save_state:
        _check_writable(Path(config.save_state))
    if config.load_state and not Path(config.load_state).is_file():
        raise InputError(f"{config.load_state} is not a file: name one of --save_state")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    from tttlm.evaluation.loading import load_model, on_mesh
    from tttlm.inference import begin, load_reading, read, save_reading, stream, with_room_for
    from tttlm.inference.generation import check_finite, prompt_ids
    from tttlm.progress import progress_bar

    prompts = [_read_prompt(config.prompt_file)] if config.prompt_file else list(config.prompt) or [""]
    if config.save_state and len(prompts) > 1:
        raise InputError(f"--save_state stores the state of one prompt, got {len(prompts)}: give one")
    with on_mesh(config.mesh) as mesh:
        loaded = load_model(config.model, tokenizer=config.tokenizer, step=config.step, mesh=mesh)
        model, tokenizer = loaded.model, loaded.tokenizer
        if config.max_length:
            model = with_room_for(model, config.max_length)
        reading = load_reading(config.load_state, model, tokenizer.fingerprint) if config.load_state else None
        generated = partial(
            stream,
            model,
            tokenizer=tokenizer,
            max_tokens=config.max_tokens,
            num_samples=config.num_samples,
            stop=config.stop,
            end_ids=() if config.ignore_end else None,
            chunk=config.chunk,
            **{name: getattr(config, name) for name in Sampling.__dataclass_fields__},
        )
        if config.save_state:
            ids = prompt_ids(model, prompts, tokenizer, continues=reading is not None)
            if config.max_tokens:
                generated(prompts=ids, reading=reading)  # what cannot be generated is refused before anything is stored
            with progress_bar(len(ids[0]), "reading", unit="token", disable=len(ids[0]) < 4 * config.chunk) as bar:
                start = begin(model, 1) if reading is None else reading
                reading = read(model, start, ids, chunk=config.chunk, on_tokens=bar.update)
            check_finite(reading.logits)
            save_reading(config.save_state, reading, model, tokenizer.fingerprint)
            if not config.max_tokens:
                return 0
        pieces = generated(prompts="" if config.save_state else prompts, reading=reading)
        finished = _show(pieces, 0 if config.json else len(prompts) * config.num_samples)
    if config.json:
        record: dict[str, Any] = {"model": config.model, "step": loaded.step, "prompts": prompts}
        print(json.dumps({**record, "samples": [asdict(one) for one in finished]}, indent=2, ensure_ascii=False))
    return 0


def _show(pieces: Iterator["Piece"], count: int) -> list["Generation"]:
    """Prints one sample as a stream, several each when it is finished; returns all, in order."""
    finished = []
    for piece in pieces:
        if count == 1:
            print(piece.text, end="", flush=True)
        if (one := piece.finished) is not None:
            finished.append(one)
            if count > 1:
                print(f"--- prompt {one.prompt + 1}, sample {one.sample + 1}\n{one.text}", flush=True)
    if count == 1:
        print()
    return sorted(finished, key=lambda one: (one.prompt, one.sample))


def _read_prompt(name: str) -> str:
    from tttlm.data.text_files import read_text

    if not Path(name).is_file():
        raise InputError(f"{name} is not a file: name a text file with --prompt_file")
    data = b"".join(read_text(Path(name)))
    text = data.decode("utf-8", "replace")
    if text.encode() != data:
        print(f"note: {name} has invalid UTF-8, which is read as U+FFFD", file=sys.stderr)
    return text


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file for --save_state")
    try:
        with open(path, "ab"):
            pass
        if not path.stat().st_size:
            path.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}: choose another path") from None


def run() -> None:
    run_command(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    run()
