"""Our models as an lm-eval language model.

Every text is scored as the start of a document: after the end-of-text token, as in training.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from suite.data.tokenizers import Tokenizer
from suite.errors import UserError
from suite.inference.generation import Sampling, generate
from suite.inference.loglikelihood import Request, encode_pair, score, windows
from suite.models.precision import is_finite
from suite.models.transformer import Transformer

DEFAULT_NEW_TOKENS = 256
"""New tokens for tasks that do not state a number (stock nq_open and triviaqa): lm-eval's default."""

ANSWER_SHARE = 4
"""A generated answer takes at most 1 / ANSWER_SHARE of the longest input; the rest is for the prompt."""


class Codec:
    """A tokenizer with a cache, for checkpoints that share a tokenizer. Callers must not change its lists."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[str, list[int]] = {}
        self._pairs: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without the end-of-text token."""
        ids = self._texts.get(text)
        if ids is None:
            ids = self._texts[text] = self.tokenizer.encode(text)
        return ids

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """See `encode_pair`."""
        key = context, continuation
        ids = self._pairs.get(key)
        if ids is None:
            ids = self._pairs[key] = encode_pair(self.tokenizer, context, continuation, self.encode)
        return ids


class SuiteLM(TemplateLM):
    """One model under lm-eval.

    Args:
        model: A Transformer of any family.
        codec: Its tokenizer.
        max_tokens: The longest input, the length of the rows it was trained on; longer contexts are
            truncated at their start, and `truncated` counts them by task.
        token_budget: Maximum number of padded tokens in a batch.
        on_progress: Called with the number of requests that are done, after every batch.
    """

    def __init__(
        self,
        model: Transformer,
        codec: Codec,
        max_tokens: int,
        token_budget: int,
        on_progress: Callable[[float], None] = lambda done: None,
    ) -> None:
        super().__init__()
        self.model, self.codec = model, codec
        self.max_tokens, self.token_budget = max_tokens, token_budget
        self.truncated: Counter[str] = Counter()
        self._on_progress, self._done = on_progress, 0

    @property
    def eot_token_id(self) -> int:
        """The token before every document."""
        return self.codec.tokenizer.eot_id

    def refuse_diverged(self) -> None:
        """Raise UserError if weights or outputs are NaN or infinite, which generated text would hide.

        All processes that hold a part of the model call this together.
        """
        damaged = [name for name, weight in self.model.named_parameters() if not is_finite(weight)]
        if torch.distributed.is_initialized():
            parts: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(parts, damaged)
            damaged = sorted({name for part in parts for name in part})
        if damaged:
            raise UserError(
                f"the model's weights {', '.join(damaged[:3])} contain NaN or infinite values: its training diverged or"
                " its checkpoint is damaged; score another checkpoint or train it again"
            )
        self._score([([self.eot_token_id], [self.eot_token_id])])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return tokens of a text, after an end-of-text token unless `add_special_tokens` is False."""
        ids = self.codec.encode(string)
        return list(ids) if add_special_tokens is False else [self.eot_token_id, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-probability in nats of each continuation, and whether greedy decoding produces it."""
        return self._loglikelihood_tokens(
            [(request.args, *self.codec.pair(*request.args)) for request in requests],
            tasks=[request.task_name for request in requests],
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], tasks: Sequence[str] = (), **_: Any
    ) -> list[tuple[float, bool]]:
        parts: list[Request] = []
        owner: list[int] = []
        for index, (_, context, continuation) in enumerate(requests):
            if len(context) + len(continuation) - 1 > self.max_tokens:
                self.truncated[tasks[index] if tasks else ""] += 1
            pieces = windows(context, continuation, self.max_tokens)
            parts += pieces
            owner += [index] * len(pieces)
        results = [(0.0, True)] * len(requests)
        scores = self._score(parts, self._progress_of(len(requests)))
        for index, (log_p, is_greedy) in zip(owner, scores, strict=True):
            results[index] = (results[index][0] + log_p, results[index][1] and is_greedy)
        return results

    def _progress_of(self, requests: int) -> Callable[[float], None]:
        """Return a function that takes the share of the next requests that is done, and reports all that are."""
        before = self._done
        self._done += requests
        return lambda share: self._on_progress(before + share * requests)

    def _score(
        self, parts: list[Request], on_progress: Callable[[float], None] = lambda share: None
    ) -> list[tuple[float, bool]]:
        scores = divided(self.model, parts, lambda mine, _: score(self.model, mine, self.token_budget, on_progress))
        if any(not math.isfinite(log_p) for log_p, _ in scores):
            raise UserError("the model returns NaN or infinite log-probabilities: its training has diverged")
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability in nats of whole texts, in windows with as much context as fits."""
        parts: list[Request] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            ids = self.codec.tokenizer.encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.eot_token_id, self.max_tokens, context_len=1):
                parts.append(make_disjoint_window(window))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, (log_p, _) in zip(owner, self._score(parts, self._progress_of(len(requests))), strict=True):
            totals[index] += log_p
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text generated for each request, up to and without its first stop string."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        for key, members in groups.items():
            options: dict[str, Any] = dict(normalize_gen_kwargs(json.loads(key), DEFAULT_NEW_TOKENS))
            for index, text in zip(members, self._generate([requests[i] for i in members], options), strict=True):
                texts[index] = text
        return texts

    def _generate(self, requests: list[Instance], options: dict[str, Any]) -> list[str]:
        """Generate for requests that share their options."""
        tokenizer = self.codec.tokenizer
        stops = [stop for stop in options["until"] if stop]
        self._check_stops(requests[0].task_name, stops)
        new_tokens = min(options["max_gen_toks"], self.max_tokens // ANSWER_SHARE)
        room = self.max_tokens - new_tokens
        prompts = []
        for request in requests:
            # spaces at the end belong to the first word of the answer
            ids = [self.eot_token_id, *self.codec.encode(request.args[0].rstrip(" "))]
            self.truncated[request.task_name] += len(ids) > room
            prompts.append(ids[-room:])
        sampling = None
        if options["do_sample"]:
            sampling = Sampling(options["temperature"], options.get("seed", 0))

        on_progress = self._progress_of(len(requests))
        # a token is at least one byte, so a new stop string is within these last tokens
        tail = 1 + max((len(stop.encode()) for stop in stops), default=0)

        def finished(ids: list[int]) -> bool:
            text = tokenizer.decode(ids[-tail:])
            return any(stop in text for stop in stops)

        def generate_share(mine: list[list[int]], numbers: list[int]) -> list[list[int]]:
            return generate(
                self.model,
                mine,
                new_tokens,
                [self.eot_token_id],
                finished,
                self.token_budget,
                sampling,
                numbers,
                agree=broadcast_from_rank0 if is_sharded(self.model) else None,
                on_progress=on_progress,
            )

        generated = divided(self.model, prompts, generate_share)
        return [before_stop(tokenizer.decode(ids), stops) for ids in generated]

    def _check_stops(self, task: str | None, stops: list[str]) -> None:
        """Raise UserError if the tokenizer cannot produce any stop string: run-on text would be scored as answers."""
        tokenizer = self.codec.tokenizer
        if stops and not any(stop in tokenizer.decode(tokenizer.encode(stop)) for stop in stops):
            raise UserError(
                f"task {task}: until: got {stops}, allowed: one that tokenizer {tokenizer.kind} can produce"
            )


Item = TypeVar("Item")
Result = TypeVar("Result")


def divided(
    model: Transformer, items: list[Item], work: Callable[[list[Item], list[int]], list[Result]]
) -> list[Result]:
    """Return the results of `work(items, their numbers)`, divided over the processes of torch.distributed, if any.

    Every process passes all items and receives all results. (lm-eval divides documents instead, which makes prompts
    with examples depend on the number of processes.) If the model is sharded, all processes work on all items, since
    they must run every forward pass together.

    Args:
        model: The model that `work` runs.
        items: The items, the same in every process.
        work: Computes the results of some items; also receives their numbers.

    Returns:
        The result of every item, in order.
    """
    if not torch.distributed.is_initialized() or is_sharded(model):
        return work(items, list(range(len(items))))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shares: list[list[Result]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(shares, work(items[rank::world], list(range(rank, len(items), world))))
    return [shares[number % world][number // world] for number in range(len(items))]


def is_sharded(model: Transformer) -> bool:
    """Return whether the model is sharded over processes, so that all of them must run every forward pass together."""
    if not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def broadcast_from_rank0(tokens: list[int]) -> list[int]:
    """Return the tokens of rank 0, in every process."""
    chosen = [tokens]
    torch.distributed.broadcast_object_list(chosen, src=0)
    return chosen[0]


def before_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
