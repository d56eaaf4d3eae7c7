"""Evaluates models on texts by named tasks; results are stored at once, so that an evaluation can be resumed."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tttlm.data.finding import printable
from tttlm.data.generated import Instance, generate
from tttlm.errors import InputError
from tttlm.evaluation import protocols
from tttlm.evaluation.config import EvalConfig
from tttlm.evaluation.dynamic import score_learning
from tttlm.evaluation.inner import with_inner
from tttlm.evaluation.intervals import Interval, bootstrap
from tttlm.evaluation.journal import Journal
from tttlm.evaluation.loading import Loaded, load_model
from tttlm.evaluation.loss import Score
from tttlm.evaluation.protocols import STREAM, Protocol, log_bins, score_protocol
from tttlm.evaluation.recall import Recalled, Scorer, recalled
from tttlm.evaluation.recall_tasks import HAYSTACK, in_haystack
from tttlm.evaluation.results import CurveRecord, LossRecord, ModelRecord, RecallRecord, Results
from tttlm.evaluation.texts import StoredText, Text, TextFile, find_texts, measure
from tttlm.inference import stream_losses, with_room_for
from tttlm.inference.saved_state import fingerprint
from tttlm.model import LanguageModel, parameter_count
from tttlm.progress import progress_bar

MOST_RECALL_TOKENS = 2**28  # of all sequences together, which are in memory


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        loaded: The model and its tokenizer.
        record: Its record in the results.
        num_tokens: Number of predicted tokens of each text.
        num_bytes: Number of bytes of those tokens.
    """

    loaded: Loaded
    record: ModelRecord
    num_tokens: tuple[int, ...]
    num_bytes: tuple[int, ...]

    @property
    def model(self) -> LanguageModel:
        """The model."""
        return self.loaded.model

    def chunk(self, config: EvalConfig) -> int:
        """Number of tokens that are read at a time: configured, or chosen by the texts, up to 2,048."""
        longest = max((1, *self.num_tokens)) if self.num_tokens else 2048
        align = self.model.config.alignment
        return -(-(config.chunk or min(2048, max(256, longest // 8))) // align) * align

    def with_room(self, config: EvalConfig, tokens: int) -> LanguageModel:
        """The model with caches for sequences of so many tokens, in complete chunks."""
        if config.max_length:
            return with_room_for(self.model, config.max_length)
        chunk = self.chunk(config)
        return with_room_for(self.model, -(-tokens // chunk) * chunk)


def evaluate(config: EvalConfig, mesh: Mesh | None = None) -> Results:
    """Runs the evaluation of `config`; invalid inputs are refused before anything is computed.

    Args:
        config: The configuration of the evaluation.
        mesh: Devices that each model is sharded over; it must be JAX's context.

    Raises:
        InputError: A model, a text or the output cannot be used, or they do not match.
    """
    if not config.models:
        raise InputError("name the folder of a run or of a released model, for example: python eval.py runs/quickstart")
    folders = [Path(path).resolve() for path in config.models]
    for path, folder in zip(config.models, folders, strict=True):
        if folders.count(folder) > 1:
            raise InputError(f"{path} is named twice: name each model once")
    texts: list[Text] = list(find_texts(config.text)) if config.text else []
    journal = Journal(Path(config.output) if config.output else None)
    loaded = [load_model(path, tokenizer=config.tokenizer, step=config.step, mesh=mesh) for path in config.models]
    made_only = config.task == ("recall",) and not {*config.recall.tasks} & {*HAYSTACK}
    if not texts and not made_only:
        texts = _held_out(loaded, config)
    subjects = [_subject(one, config, texts) for one in loaded]
    for subject in subjects:
        _check(subject, config, texts)
    sizes = zip(texts, subjects[0].num_bytes, strict=True)
    named = [{"name": text.name, "bytes": size, "words": text.words, "sha256": text.digest} for text, size in sizes]
    results = Results([s.record for s in subjects], named, asdict(config), _notes(subjects, texts))
    if "loss" in config.task:
        for subject in subjects:
            results.loss.extend(_losses(subject, config, texts, named, journal))
    if "positions" in config.task:
        results.positions.extend(_positions(subjects, config, texts, journal))
    if "recall" in config.task:
        for subject in subjects:
            results.recall.extend(_recall(subject, config, texts, journal))
    return results


def _held_out(loaded: Sequence[Loaded], config: EvalConfig) -> list[Text]:
    run = loaded[0].run
    if run is None:
        raise InputError(f"{loaded[0].path} is a released model, which has no held-out text: name texts with --text")
    tokenizer = run.tokenizer()
    texts: list[Text] = [StoredText(d.name, d, tokenizer) for d in run.held_out(config.limit) if len(d.tokens) > 1]
    if not texts:
        raise InputError(f"{run.checked_data} has no held-out text to score: name texts with --text")
    return texts


def _subject(loaded: Loaded, config: EvalConfig, texts: Sequence[Text]) -> Subject:
    changed = []
    inner = config.inner
    model = with_inner(
        loaded.model,
        mini_batch_size=inner.mini_batch_size or None,
        learning_rate_multiplier=inner.learning_rate,
    )
    if inner.mini_batch_size:
        changed.append(f"inner mini-batches of {inner.mini_batch_size}")
    if inner.learning_rate != 1:
        changed.append(f"inner learning rate times {inner.learning_rate:g}")
    sizes = [measure(text, loaded.tokenizer) for text in texts]
    counts = tuple(tokens for tokens, _ in sizes)
    read = [*(config.recall.lengths if "recall" in config.task else ()), *(counts if "loss" in config.task else ())]
    if "positions" in config.task:
        read += [protocol.length(n) for protocol in _protocols(config) for n in _limited(counts, config)]
    longest = max(read, default=0)
    if loaded.trained_length is not None and longest > loaded.trained_length:
        changed.append(f"context of up to {longest:,} tokens, trained on {loaded.trained_length:,}")
    names = [Path(os.path.abspath(path)).parts for path in config.models]
    mine = Path(os.path.abspath(loaded.path)).parts
    length = next(n for n in range(1, len(mine) + 2) if n > len(mine) or [p[-n:] for p in names].count(mine[-n:]) == 1)
    record = ModelRecord(
        name=printable("/".join(mine[-length:])),
        path=loaded.path,
        step=loaded.step,
        fingerprint=fingerprint(model),
        tokenizer=loaded.tokenizer.fingerprint,
        parameters=parameter_count(model.config),
        mixers=list(model.config.mixers),
        trained_length=loaded.trained_length,
        changed=changed,
    )
    return Subject(replace(loaded, model=model), record, counts, tuple(size for _, size in sizes))


def _check(subject: Subject, config: EvalConfig, texts: Sequence[Text]) -> None:
    """Refuses inputs that would fail later."""
    room = config.max_length if subject.model.config.cache_length is not None else 0
    wanted: list[tuple[int, str]] = []
    if "recall" in config.task:
        of_a_length = sum(len(_depths(task, config)) for task in config.recall.tasks) * config.recall.samples
        if (total := of_a_length * sum(config.recall.lengths)) > MOST_RECALL_TOKENS:
            raise InputError(
                f"the recall tasks take {total:,} tokens, at most {MOST_RECALL_TOKENS:,} are possible: lower "
                "--recall.lengths or --recall.samples"
            )
        wanted.append((max(config.recall.lengths, default=0), "--recall.lengths"))
    if "loss" in config.task and texts:
        wanted.append((max(subject.num_tokens), "the longest text"))
    if "positions" in config.task:
        for protocol in _protocols(config):
            counts, most = _limited(subject.num_tokens, config), config.positions.length
            wanted.append((max(map(protocol.length, counts)), protocol.name))
            if not protocol.whole and 0 < most < protocol.cut:
                raise InputError(
                    f"--positions.length {most:,} is less than a window of {protocol.cut:,}: raise it, or lower "
                    "--positions.windows"
                )
            for text, count in zip(texts, counts, strict=True):
                if not protocol.whole and count < protocol.cut:
                    raise InputError(
                        f"{text.name} has {count:,} tokens for {subject.record.name}, fewer than a window of "
                        f"{protocol.cut:,}: leave it out, or lower --positions.windows"
                    )
    for tokens, what in wanted:
        if room and tokens > room:
            raise InputError(
                f"{what} takes {tokens:,} tokens, and the attention of {subject.record.name} has room for {room:,}: "
                "raise --max_length, or 0 for as many as it takes"
            )


def _notes(subjects: Sequence[Subject], texts: Sequence[Text]) -> list[str]:
    notes = [f"{s.record.name}: {change}" for s in subjects for change in s.record.changed]
    if len({s.record.tokenizer for s in subjects}) > 1:
        notes.append("tokenizers differ: compare bits per byte and word perplexity, not losses")
    if invalid := [text.name for text in texts if isinstance(text, TextFile) and not text.is_utf8]:
        notes.append(f"texts with invalid UTF-8 ({len(invalid)}), which is read as U+FFFD: {', '.join(invalid[:3])}")
    return notes


def _key(subject: Subject, text: Text, **settings: Any) -> dict[str, Any]:
    """Everything a result depends on."""
    record = subject.record
    return {"model": record.fingerprint, "tokenizer": record.tokenizer, "text": text.digest, **settings}


def _refuse_not_finite(subject: Subject, nats: float, what: str, *, learning: bool = False) -> None:
    """Refuses a model whose outputs are not numbers."""
    if not np.isfinite(nats):
        why = "its parameters are not finite or its training diverged: choose another checkpoint or model"
        raise InputError(
            f"{subject.record.name}: the loss on {what} is {nats}, so "
            + ("learning diverged: lower --adapt.learning_rate" if learning else why)
        )


def _losses(
    subject: Subject, config: EvalConfig, texts: Sequence[Text], named: Sequence[dict[str, Any]], journal: Journal
) -> Iterator[LossRecord]:
    found = dict(_by_text(subject, config, texts, STREAM, [0, max(subject.num_tokens)], journal, subject.num_tokens))
    scores = [Score(float(sum(found[n]["nats"])), subject.num_tokens[n], named[n]["bytes"]) for n in range(len(texts))]
    words = [one["words"] for one in named]
    yield from _loss_records(subject.record.name, [text.name for text in texts], scores, words)
    if config.adapt.learning_rate:
        documents = [np.concatenate([tokens for tokens, _ in t.chunks(subject.loaded.tokenizer)]) for t in texts]
        description = f"{subject.record.name}, scoring and learning"
        nats = score_learning(subject.model, documents, config.adapt, description=description)
        for text, of in zip(texts, nats, strict=True):
            _refuse_not_finite(subject, of, f"{text.name}, learning as it reads,", learning=True)
        learned = [replace(score, nats=of) for score, of in zip(scores, nats, strict=True)]
        names = [f"{text.name}, learning as it reads" for text in texts]
        yield from _loss_records(subject.record.name, names, learned, words)


def _loss_records(model: str, names: Sequence[str], scores: Sequence[Score], words: list[int]) -> Iterator[LossRecord]:
    """A record for each text, and one for all if there are several."""
    for name, score, count in zip(names, scores, words, strict=True):
        yield _loss_record(model, name, score, count)
    if len(scores) > 1:
        total = Score(sum(s.nats for s in scores), sum(s.tokens for s in scores), sum(s.bytes for s in scores))
        _, comma, how = names[0].partition(", learning")
        yield _loss_record(model, f"all{comma}{how}", total, sum(words))


def _loss_record(model: str, text: str, score: Score, words: int) -> LossRecord:
    per_word = Score(score.nats, words, score.bytes).perplexity
    numbers = score.nats, score.loss, score.perplexity, per_word, score.bits_per_byte
    return LossRecord(model, text, score.bytes, words, score.tokens, *numbers)


def _by_text(
    subject: Subject,
    config: EvalConfig,
    texts: Sequence[Text],
    protocol: Protocol,
    bins: list[int],
    journal: Journal,
    num_tokens: Sequence[int],
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """Losses of every text in bins, stored ones first."""
    # A result does not depend on the bins that the text is too short for.
    ends = [min(n, bins[-1]) for n in num_tokens]
    own = [[*(start for start in bins if start < end), end] for end in ends]
    keys = [
        _key(subject, text, protocol=protocol.name, bins=of_text, tokens=n)
        for text, of_text, n in zip(texts, own, num_tokens, strict=True)
    ]
    left = []
    for number, key in enumerate(keys):
        if (kept := journal.get(key)) is not None:
            yield number, {name: values + [0.0] * (len(bins) - 1 - len(values)) for name, values in kept.items()}
        else:
            left.append(number)
    if not left:
        return
    # The longest first, so that parallel streams end at about the same time.
    left.sort(key=lambda number: -num_tokens[number])
    counts = [num_tokens[number] for number in left]
    model = subject.with_room(config, max(protocol.length(count) for count in counts))
    total = sum(protocol.predicted(count) for count in num_tokens)
    done = total - sum(protocol.predicted(count) for count in counts)
    with progress_bar(total, f"{subject.record.name}, {protocol.name}", unit="token", initial=done) as bar:
        scored = score_protocol(
            model,
            subject.loaded.tokenizer,
            [texts[number] for number in left],
            protocol,
            bins,
            num_tokens=counts,
            batch_size=min(config.batch_size, max(1, sum(counts) // (protocol.cut or max(counts)))),
            chunk=min(subject.chunk(config), protocol.cut or subject.chunk(config)),
            on_tokens=bar.update,
        )
        for at, binned in scored:
            _refuse_not_finite(subject, float(np.sum(binned.nats)), texts[left[at]].name)
            value = {"nats": binned.nats.tolist(), "tokens": binned.tokens.tolist()}
            count = len(own[left[at]]) - 1
            journal.put(keys[left[at]], {name: values[:count] for name, values in value.items()})
            yield left[at], value


def _protocols(config: EvalConfig) -> list[Protocol]:
    wanted = config.positions
    found = [protocols.windows(n) for n in dict.fromkeys(wanted.windows) if "windows" in wanted.protocols]
    found += [STREAM] if "stream" in wanted.protocols else []
    return found + [
        protocols.reset_every(n) for n in dict.fromkeys(wanted.reset_every) if "reset_every" in wanted.protocols
    ]


def _limited(num_tokens: Sequence[int], config: EvalConfig) -> list[int]:
    """The number of tokens of each text that are read by position."""
    most = config.positions.length
    return [min(n, most) if most else n for n in num_tokens]


def _positions(
    subjects: Sequence[Subject], config: EvalConfig, texts: Sequence[Text], journal: Journal
) -> Iterator[CurveRecord]:
    settings: dict[str, Any] = {"resamples": config.positions.resamples, "seed": config.seed}
    found: dict[tuple[str, str], tuple[np.ndarray, np.ndarray, list[int]]] = {}
    for protocol in _protocols(config):
        for subject in subjects:
            counts = _limited(subject.num_tokens, config)
            bins = log_bins(protocol.cut if not protocol.whole else max(counts))
            by_text = dict(_by_text(subject, config, texts, protocol, bins, journal, counts))
            nats, tokens = (np.asarray([by_text[n][k] for n in range(len(texts))]) for k in ("nats", "tokens"))
            found[subject.record.name, protocol.name] = nats, tokens, bins
            yield _curve("loss", subject, "", protocol.name, bins, tokens, bootstrap(nats, tokens, **settings))
    for protocol in _protocols(config):
        first = subjects[0]
        for other in subjects[1:]:
            if other.record.tokenizer == first.record.tokenizer:
                (a, tokens, bins), (b, _, _) = (found[s.record.name, protocol.name] for s in (other, first))
                interval = bootstrap(a, tokens, against=b, **settings)
                yield _curve("difference", other, first.record.name, protocol.name, bins, tokens, interval)
    for subject in subjects:
        if (subject.record.name, STREAM.name) not in found:
            continue
        for protocol in _protocols(config):
            if protocol.whole and protocol.cut:
                on, tokens, bins = found[subject.record.name, STREAM.name]
                interval = bootstrap(found[subject.record.name, protocol.name][0], tokens, against=on, **settings)
                yield _curve("gain", subject, protocol.name, STREAM.name, bins, tokens, interval)


def _curve(
    kind: str, subject: Subject, against: str, protocol: str, bins: list[int], tokens: np.ndarray, interval: Interval
) -> CurveRecord:
    plain = lambda a: None if a is None else [None if np.isnan(x) else float(x) for x in a]
    count = tokens.sum(axis=0).astype(int).tolist()
    ends = plain(interval.low), plain(interval.high)
    return CurveRecord(
        kind, subject.record.name, against, protocol, bins, len(tokens), count, plain(interval.mean) or [], *ends
    )


def _recall(subject: Subject, config: EvalConfig, texts: Sequence[Text], journal: Journal) -> Iterator[RecallRecord]:
    settings = config.recall
    cells = [(t, n, d) for t in settings.tasks for n in settings.lengths for d in _depths(t, config)]
    haystack = np.zeros(0, np.int64)
    if texts:
        haystack = np.concatenate([tokens for text in texts for tokens, _ in text.chunks(subject.loaded.tokenizer)])
    digest = hashlib.sha256("".join(text.digest for text in texts).encode()).hexdigest()
    # All sequences are made before the first is read, so that errors are raised early.
    made = [[*_instances(subject, config, haystack, task, length, depth)] for task, length, depth in cells]
    with progress_bar(len(cells), f"{subject.record.name}, recall", unit="cell") as bar:
        for (task, length, depth), instances in zip(cells, made, strict=True):
            key: dict[str, Any] = {"task": task, "length": length, "depth": depth, "samples": settings.samples}
            key |= {"seed": config.seed, "model": subject.record.fingerprint, "texts": digest}
            key |= {"tokenizer": subject.record.tokenizer}
            kept = journal.get(key)
            if kept is None:
                kept = asdict(recalled(instances, _scorer(subject, config, length)))
                _refuse_not_finite(subject, kept["nats"], task)
                journal.put(key, kept)
            got = Recalled(**kept)
            sizes = {"mqar": len(instances[0].answers), "copy": got.tokens // len(instances)}
            yield RecallRecord(
                model=subject.record.name,
                task=task,
                length=length,
                depth=depth,
                pairs=sizes.get(task),
                samples=len(instances),
                answers=got.answers,
                exact_match=got.exact_match,
                token_accuracy=got.token_accuracy,
                nats_per_answer=got.nats_per_answer,
            )
            bar.update(1)


def _scorer(subject: Subject, config: EvalConfig, length: int) -> Scorer:
    model, chunk = subject.with_room(config, length), min(subject.chunk(config), length)
    batch_size = min(config.batch_size, config.recall.samples)
    return lambda documents: stream_losses(model, documents, batch_size=batch_size, chunk=chunk)


def _depths(task: str, config: EvalConfig) -> Sequence[float | None]:
    return config.recall.depths if task in HAYSTACK else (None,)


def _instances(
    subject: Subject, config: EvalConfig, haystack: np.ndarray, task: str, length: int, depth: float | None
) -> Iterator[Instance]:
    vocab_size = min(subject.loaded.tokenizer.vocab_size, subject.model.config.vocab_size)
    name = json.dumps([config.seed, task, length, depth])
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    for _ in range(config.recall.samples):
        if task not in HAYSTACK:
            yield generate(task, length, vocab_size, rng)
        else:
            assert depth is not None
            yield in_haystack(task, haystack, subject.loaded.tokenizer, length=length, depth=depth, rng=rng)
