"""Any model here as a model of lm-evaluation-harness (the extra `lm-eval`): log-likelihoods and generation.

>>> import lm_eval
>>> lm_eval.simple_evaluate(HarnessModel("runs/a"), tasks=["my_task"], torch_random_seed=None)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from tttlm.errors import InputError
from tttlm.evaluation.loading import load_model
from tttlm.inference import generate, stream_losses, with_room_for
from tttlm.model import LanguageModel


class HarnessModel(TemplateLM):
    """A run or a released model, for the tasks of lm-evaluation-harness.

    Every text is read after the token that documents are entered from.

    Args:
        path: The folder of the model, see `tttlm.evaluation.loading.load_model`.
        tokenizer: The tokenizer of a released model without one beside it.
        step: The checkpoint of a run; None is the newest.
        batch_size: Number of texts that are read in parallel.
        chunk: Number of tokens of a text in one call.
        max_tokens: Largest number of tokens that are generated if a task does not say.

    Raises:
        InputError: The model cannot be loaded, or its tokenizer has no token to enter a document from.
    """

    def __init__(
        self,
        path: str,
        *,
        tokenizer: str = "",
        step: int | None = None,
        batch_size: int = 8,
        chunk: int = 512,
        max_tokens: int = 256,
    ) -> None:
        super().__init__()
        self._loaded = load_model(path, tokenizer=tokenizer, step=step)
        self._batch_size, self._chunk, self._max_tokens = batch_size, chunk, max_tokens
        if self._loaded.tokenizer.entry_id is None:
            raise InputError(f"the tokenizer of {path} has no token to enter a document from, which the harness needs")

    @property
    def eot_token_id(self) -> int:
        """The token that documents are entered from, which is that at their end where there is one."""
        entry = self._loaded.tokenizer.entry_id
        assert entry is not None
        return entry

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in caches of requests."""
        return self._loaded.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """The tokens of a text, without control tokens whatever is asked for."""
        return self._loaded.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether greedy decoding gives it."""
        entered = [self._entered([*context, *continuation]) for _, context, continuation in requests]
        found = self._scored(entered)
        lengths = [len(continuation) for _, _, continuation in requests]
        return [
            (-float(nats[len(nats) - n :].sum()), bool(hit[len(hit) - n :].all()))
            for (nats, hit), n in zip(found, lengths, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, given all before it, however long it is."""
        entered = [self._entered(self.tok_encode(request.args[0])) for request in requests]
        return [-float(nats.sum()) for nats, _ in self._scored(entered)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, until a string of `until`; greedy unless a task samples."""
        written = []
        for request in requests:
            context, settings = request.args
            until = settings.get("until") or []
            stop = [until] if isinstance(until, str) else list(until)
            prompt = self._entered(self.tok_encode(context))
            most = int(settings.get("max_gen_toks") or self._max_tokens)
            (one,) = generate(
                self._with_room([len(prompt) + most]),
                prompt.tolist(),
                self._loaded.tokenizer,
                max_tokens=most,
                temperature=float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0,
                top_p=float(settings.get("top_p", 1.0)),
                top_k=int(settings.get("top_k", 0)),
                stop=[text for text in stop if text],
                chunk=self._chunk,
            )
            written.append(one.text)
        return written

    def _entered(self, tokens: Sequence[int]) -> np.ndarray:
        entry = self.eot_token_id
        return np.asarray(tokens if len(tokens) and tokens[0] == entry else [entry, *tokens], np.int64)

    def _scored(self, texts: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """-log p of every token after the first, and whether it is the likeliest, for each text."""
        found = [(np.zeros(len(text) - 1), np.zeros(len(text) - 1, bool)) for text in texts]
        model = self._with_room([len(text) for text in texts])
        documents = ([text] for text in texts)
        for losses in stream_losses(model, documents, batch_size=min(self._batch_size, len(texts)), chunk=self._chunk):
            for number in np.unique(losses.document):
                of = losses.document == number
                found[number][0][losses.position[of]] = losses.nats[of]
                found[number][1][losses.position[of]] = losses.hit[of]
        return found

    def _with_room(self, lengths: Sequence[int]) -> LanguageModel:
        """The model, with caches of whole powers of two, so that few programs are compiled."""
        return with_room_for(self._loaded.model, max(self._chunk, 1 << max(lengths).bit_length()))
