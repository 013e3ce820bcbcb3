"""Batched generation with a key-value cache: greedy decoding or sampling.

Shapes: B rows of a batch, T padded length, D model width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from suite.inference.batching import batches_of, evaluation_mode
from suite.models.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """Sample tokens at a temperature. A prompt's samples depend on the seed and its number, not on its batch."""

    temperature: float
    seed: int


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    finished: Callable[[list[int]], bool] | None = None,
    token_budget: int = 16384,
    sampling: Sampling | None = None,
    numbers: Sequence[int] | None = None,
    agree: Callable[[list[int]], list[int]] | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[list[int]]:
    """Continue each prompt with a key-value cache; finished rows leave the batch.

    Args:
        model: A Transformer of any family; it is in evaluation mode during the call.
        prompts: Token ids, at least one each; shorter prompts of a batch are padded on the left.
        max_new_tokens: Maximum number of tokens generated per prompt.
        stop_ids: A generated token among these ends its row and is not returned.
        finished: Called with a row's generated ids after each token; if it returns true, the row ends.
        token_budget: Maximum number of tokens in the cache of a batch, padded prompts and new tokens together.
        sampling: None for greedy decoding.
        numbers: Numbers of the prompts, which seed their samples; None: their positions.
        agree: Makes processes that share a model choose the same tokens, although their sums may differ by rounding.
        on_progress: Called with the share of the batches that are done, after every batch.

    Returns:
        The generated ids of each prompt, in their order.
    """
    results: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens < 1:
        return results
    stops = frozenset(stop_ids)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    sizes = [len(prompt) + max_new_tokens for prompt in prompts]
    choose = _chooser(sampling, range(len(prompts)) if numbers is None else numbers, agree)
    with evaluation_mode(model) as device:
        batches = list(batches_of(order, sizes, token_budget))
        for number, batch in enumerate(batches, start=1):
            _generate_batch(
                model,
                {i: prompts[i] for i in batch},
                results,
                max_new_tokens,
                stops,
                finished,
                choose,
                device,
            )
            on_progress(number / len(batches))
    return results


Chooser = Callable[[Tensor, Sequence[int]], list[int]]
"""(logits_BV, the prompt index of each row) -> the next token of each row"""


def _chooser(
    sampling: Sampling | None, numbers: Sequence[int], agree: Callable[[list[int]], list[int]] | None
) -> Chooser:
    choose = _local_chooser(sampling, numbers)
    return choose if agree is None else lambda logits_BV, rows: agree(choose(logits_BV, rows))


def _local_chooser(sampling: Sampling | None, numbers: Sequence[int]) -> Chooser:
    if sampling is None or sampling.temperature == 0:
        return lambda logits_BV, _: logits_BV.argmax(-1).tolist()
    temperature = sampling.temperature
    generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + number) for number in numbers]

    def sample(logits_BV: Tensor, rows: Sequence[int]) -> list[int]:
        # The argmax of log p plus Gumbel noise is a sample from p.
        vocab = logits_BV.shape[-1]
        uniform_BV = torch.stack([torch.rand(vocab, generator=generators[i], dtype=torch.float64) for i in rows])
        gumbel_BV = -(-uniform_BV.clamp_min(1e-300).log()).log()
        return (logits_BV.double().cpu() / temperature + gumbel_BV).argmax(-1).tolist()

    return sample


def _generate_batch(
    model: Transformer,
    prompts: dict[int, Sequence[int]],
    results: list[list[int]],
    max_new_tokens: int,
    stops: frozenset[int],
    finished: Callable[[list[int]], bool] | None,
    choose: Chooser,
    device: torch.device,
) -> None:
    """Generate for the prompts of one batch, by index, and append to `results`."""
    rows = list(prompts)
    longest = max(len(prompt) for prompt in prompts.values())
    pads = [longest - len(prompts[i]) for i in rows]
    tokens_BT = torch.tensor([[0] * pad + list(prompts[i]) for pad, i in zip(pads, rows, strict=True)], device=device)
    pad_B = torch.tensor(pads, device=device)
    cache = model.new_cache(len(rows), longest + max_new_tokens)
    for count in itertools.count(1):
        x_BTD = model.hidden(tokens_BT, cache=cache, pad_B=pad_B)
        chosen = choose(model.head(x_BTD[:, -1]).float(), rows)
        unfinished: list[int] = []
        for b, (i, token) in enumerate(zip(rows, chosen, strict=True)):
            if token in stops:
                continue
            results[i].append(token)
            if finished is None or not finished(results[i]):
                unfinished.append(b)
        if not unfinished or count == max_new_tokens:
            return
        tokens_BT = torch.tensor([[chosen[b]] for b in unfinished], device=device)
        if len(unfinished) < len(rows):
            unfinished_B = torch.tensor(unfinished, device=device)
            cache.select(unfinished_B)
            pad_B = pad_B[unfinished_B]
            rows = [rows[b] for b in unfinished]
