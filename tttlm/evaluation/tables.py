"""The tables that an evaluation prints."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from tttlm.evaluation.results import CurveRecord, RecallRecord, Results

MOST_TEXTS = 20  # number of texts up to which each is shown


def tables(results: Results) -> Iterator[str]:
    """Yields the lines of the tables of all results."""
    for model in results.models:
        step = "" if model.step is None else f", step {model.step:,}"
        yield f"{model.name}: {model.path}{step}, {model.parameters:,} parameters, {'/'.join(model.mixers)}"
    yield from (f"note: {note}" for note in results.notes)
    if results.loss:
        yield from _losses(results)
    for kind, title in (("loss", "loss by position"), ("difference", "difference"), ("gain", "gain over a reset")):
        curves = [curve for curve in results.positions if curve.kind == kind]
        groups = dict.fromkeys((curve.protocol, curve.against) for curve in curves)
        for protocol, against in groups:
            same = [c for c in curves if (c.protocol, c.against) == (protocol, against)]
            said = {"loss": "", "difference": f", minus {against}", "gain": f", {against} minus this"}[kind]
            yield ""
            yield f"{title}, {protocol}{said} (nats per token, [95% interval over documents: {same[0].documents}])"
            yield from _curves(same)
    for task in dict.fromkeys(cell.task for cell in results.recall):
        yield ""
        yield f"{task}: correct answers in percent (nats per answer)"
        yield from _recall([cell for cell in results.recall if cell.task == task])


def _losses(results: Results) -> Iterator[str]:
    names = max(len(one.model) for one in results.loss), max(len(one.text) for one in results.loss)
    yield ""
    yield (
        f"{'model':{names[0]}}  {'text':{names[1]}}  {'bytes':>12}  {'tokens':>12}  {'loss':>8}  {'perplexity':>10}"
        f"  {'word perplexity':>15}  {'bits per byte':>13}"
    )
    several = len(results.texts) > MOST_TEXTS
    for one in (one for one in results.loss if not several or one.text.startswith("all")):
        yield (
            f"{one.model:{names[0]}}  {one.text:{names[1]}}  {one.bytes:12,}  {one.tokens:12,}  {one.loss:8.4f}"
            f"  {one.perplexity:10.2f}  {one.word_perplexity:15.4g}  {one.bits_per_byte:13.4f}"
        )


def _curves(curves: Sequence[CurveRecord]) -> Iterator[str]:
    width = max(24, *(len(curve.model) for curve in curves))
    yield "  ".join([f"{'positions':>17}", *(f"{curve.model:>{width}}" for curve in curves)])
    longest = max(curves, key=lambda curve: len(curve.bins)).bins
    for i, (start, stop) in enumerate(pairwise(longest)):
        yield "  ".join([f"{start:>8,}-{stop - 1:<8,}", *(f"{_value(curve, i):>{width}}" for curve in curves)])


def _value(curve: CurveRecord, i: int) -> str:
    mean = curve.mean[i] if i < len(curve.mean) else None
    if mean is None:
        return ""
    if curve.low is None or curve.high is None:
        return f"{mean:.4f}"
    return f"{mean:.4f} [{curve.low[i]:.4f}, {curve.high[i]:.4f}]"


def _recall(cells: Sequence[RecallRecord]) -> Iterator[str]:
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    names = list(dict.fromkeys(cell.model for cell in cells))
    width = max(5, *(len(name) for name in names))
    yield "  ".join([f"{'model':{width}}", f"{'depth':>5}", *(f"{length:>15,}" for length in lengths)])
    for name in names:
        for depth in dict.fromkeys(cell.depth for cell in cells):
            row = {cell.length: cell for cell in cells if (cell.model, cell.depth) == (name, depth)}
            shown = [f"{row[n].exact_match:6.1f} ({row[n].nats_per_answer:.2f})" for n in lengths]
            yield "  ".join(
                [f"{name:{width}}", f"{'' if depth is None else f'{depth:g}':>5}", *(f"{s:>15}" for s in shown)]
            )
