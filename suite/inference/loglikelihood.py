"""Log-probabilities and generation for our own models: batched, exact, and free of any evaluation library.

Requests that share all their input tokens are scored by one row, and so is a request whose input begins
another's (the models are causal in evaluation mode). Rows are sorted by length and batched by a budget of
padded tokens; the output head runs only where a score is asked for.

Shapes: B rows of a batch, T padded length, D model width, N scored positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from suite.data.tokenizers import Tokenizer
from suite.models.transformer import Transformer

Request = tuple[Sequence[int], Sequence[int]]
"""(context ids, continuation ids)"""

LOGITS_AT_ONCE = 1 << 25  # fp32 elements of one output-head call: 128 MiB


@contextmanager
def evaluation_mode(model: Transformer) -> Iterator[torch.device]:
    """Evaluation mode without gradients, and back to the mode it was in. Yields the model's device."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def encode_pair(
    tokenizer: Tokenizer,
    context: str,
    continuation: str,
    encode: Callable[[str], list[int]] | None = None,
) -> tuple[list[int], list[int]]:
    """Context, end-of-text token first, and continuation: the tokens of the whole text, cut after the context.

    Spaces that end the context go to the continuation, as lm-eval does: a word belongs to the space before it.
    `encode` may remember texts, which many requests share.
    """
    encode = encode or tokenizer.encode
    bare = context.rstrip(" ")
    continuation = context[len(bare) :] + continuation
    head = encode(bare) if bare else []
    if tokenizer.splits_at_spaces and continuation.startswith(" ") and not continuation[1:2].isspace():
        # a token begins at a single space: the parts are the whole, and contexts are read once
        return [tokenizer.eot_id, *head], encode(continuation)
    return [tokenizer.eot_id, *head], tokenizer.encode(bare + continuation)[len(head) :]


def windows(context: Sequence[int], continuation: Sequence[int], max_tokens: int) -> list[Request]:
    """A request as requests of at most `max_tokens` inputs (the last continuation token is never one).

    The context loses its start where it is too long. A continuation that leaves no room is scored in parts,
    each after as much of what precedes it as fits: their log-probabilities add up.
    """
    if len(continuation) <= max_tokens:
        return [(context[-(max_tokens - max(len(continuation) - 1, 0)) :], continuation)]
    whole = [*context, *continuation]
    step = max(1, max_tokens // 2)
    ends = [min(start + step, len(whole)) for start in range(len(context), len(whole), step)]
    starts = range(len(context), len(whole), step)
    return [
        (whole[max(0, end - 1 - max_tokens) : start], whole[start:end]) for start, end in zip(starts, ends, strict=True)
    ]


def score(model: Transformer, requests: Sequence[Request], token_budget: int = 16384) -> list[tuple[float, bool]]:
    """Log-probability of each continuation after its context, and whether greedy decoding would produce it.

    Args:
        model: any of our models; it is put in evaluation mode for the call.
        requests: (context ids, continuation ids); a context has at least one token (the end-of-text token
            does).
        token_budget: most padded tokens in a batch; a longer row goes alone.

    Returns:
        One (sum of log-probabilities in nats, fp32; greedy) per request, in their order. (0.0, True) for an
        empty continuation.
    """
    inputs = [_input_ids(context, continuation) for context, continuation in requests]
    rows, row_of = _shared_rows(inputs)
    members: list[list[int]] = [[] for _ in rows]
    for request, row in enumerate(row_of):
        if requests[request][1]:
            members[row].append(request)
    stems = [min((len(requests[request][0]) for request in of_row), default=0) for of_row in members]

    results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    with evaluation_mode(model) as device:
        for batch, is_shared in _plan(rows, stems, token_budget):
            hidden = _shared_hidden if is_shared else _plain_hidden
            x_BTD = hidden(model, [rows[row] for row in batch], [stems[row] for row in batch], device)
            first = [stems[row] - 1 if is_shared else 0 for row in batch]
            asked = [request for row in batch for request in members[row]]
            cells = [
                (b * x_BTD.shape[1] + len(requests[request][0]) - 1 - first[b] + offset, token)
                for b, row in enumerate(batch)
                for request in members[row]
                for offset, token in enumerate(requests[request][1])
            ]
            log_p_N, top_N = _score_cells(model, x_BTD.flatten(0, 1), cells)
            lengths = [len(requests[request][1]) for request in asked]
            for request, log_p, top in zip(asked, log_p_N.split(lengths), top_N.split(lengths), strict=True):
                results[request] = (float(log_p.sum()), bool(top.all()))
    return results


def _input_ids(context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
    if not context:
        raise ValueError("a context needs at least one token; begin it with the end-of-text token")
    return (*context, *continuation[:-1])


def _shared_rows(inputs: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The distinct inputs that begin no other input, and for each input the row that contains it."""
    rows: list[tuple[int, ...]] = []
    row_of = [0] * len(inputs)
    # in descending order an input comes directly after the longer ones that begin with it
    for request in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        ids = inputs[request]
        if not rows or rows[-1][: len(ids)] != ids:
            rows.append(ids)
        row_of[request] = len(rows) - 1
    return rows, row_of


def _batches(order: Iterable[int], lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Consecutive groups of `order` (longest first) whose padded size keeps to the budget."""
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _plan(rows: Sequence[tuple[int, ...]], stems: Sequence[int], token_budget: int) -> Iterator[tuple[list[int], bool]]:
    """Batches of rows, and whether their stems are to be read once: where that halves the tokens.

    `stems` gives for each row how many tokens precede all it is asked for; 0: it is asked nothing.
    """
    by_stem: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(stems):
        if length:
            by_stem.setdefault(rows[row][:length], []).append(row)
    alone: list[int] = []
    together: list[list[int]] = []
    for stem, family in by_stem.items():
        each = sum(len(rows[row]) for row in family)
        if each >= 2 * (each - (len(family) - 1) * len(stem)):
            size = max(1, token_budget // max(len(rows[row]) for row in family))
            together += [family[start : start + size] for start in range(0, len(family), size)]
        else:
            alone += family
    alone.sort(key=lambda row: -len(rows[row]))
    for batch in _batches(alone, [len(row) for row in rows], token_budget):
        yield batch, False
    together.sort(key=lambda family: -stems[family[0]])
    batch = []
    for family in together:
        longest = max(len(rows[row]) for row in [*batch, *family])
        if batch and (len(batch) + len(family)) * longest > token_budget:
            yield batch, True
            batch = []
        batch += family
    if batch:
        yield batch, True


def _plain_hidden(model: Transformer, rows: Sequence[Sequence[int]], _: Sequence[int], device: torch.device) -> Tensor:
    """Hidden states [B, T, D] of whole rows; causal models need no mask for padding on the right."""
    return model.hidden(_padded(rows, device))


def _shared_hidden(
    model: Transformer, rows: Sequence[Sequence[int]], stems: Sequence[int], device: torch.device
) -> Tensor:
    """Hidden states [B, 1 + U, D] of each row's last stem token and of the U at most that follow it.

    Each distinct stem is read once; its keys and values are then taken by every row that begins with it.
    """
    number: dict[tuple[int, ...], int] = {}
    owner = [number.setdefault(tuple(row[:length]), len(number)) for row, length in zip(rows, stems, strict=True)]
    tails = [row[length:] for row, length in zip(rows, stems, strict=True)]
    longest = max(stems)
    stems_GS = torch.tensor([[0] * (longest - len(stem)) + list(stem) for stem in number], device=device)
    pad_G = torch.tensor([longest - len(stem) for stem in number], device=device)
    owner_B = torch.tensor(owner, device=device)
    cache = model.new_cache(len(number), longest + max(len(tail) for tail in tails))
    x_B1D = model.hidden(stems_GS, cache=cache, pad_B=pad_G)[:, -1:][owner_B]
    if not any(tails):
        return x_B1D
    cache.select(owner_B)
    return torch.cat((x_B1D, model.hidden(_padded(tails, device), cache=cache, pad_B=pad_G[owner_B])), dim=1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of token ids as one tensor, filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _score_cells(model: Transformer, x_PD: Tensor, cells: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """For each (place in x, target): log p of the target there, fp32, and whether it is the likeliest."""
    device = x_PD.device
    place_N, target_N = torch.tensor(cells, device=device).unbind(1)
    place_U, unique_N = torch.unique(place_N, return_inverse=True)

    log_p_N = torch.empty(len(cells), dtype=torch.float32, device=device)
    top_N = torch.empty(len(cells), dtype=torch.bool, device=device)
    vocab = model.head(x_PD[:1]).shape[-1]
    step = max(1, LOGITS_AT_ONCE // vocab)
    for start in range(0, len(place_U), step):
        logits_UV = model.head(x_PD[place_U[start : start + step]]).float()
        here_N = ((unique_N >= start) & (unique_N < start + step)).nonzero().squeeze(1)
        u_N, t_N = unique_N[here_N] - start, target_N[here_N]
        log_p_N[here_N] = logits_UV[u_N, t_N] - logits_UV.logsumexp(-1)[u_N]
        top_N[here_N] = logits_UV.argmax(-1)[u_N] == t_N
    return log_p_N.cpu(), top_N.cpu()


@dataclass(frozen=True)
class Sampling:
    """Draw tokens at a temperature; a prompt's draws depend on (seed, its number), not on its batch."""

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
) -> list[list[int]]:
    """Continue each prompt with a key-value cache; rows that are done leave the batch.

    Args:
        model: any of our models; it is put in evaluation mode for the call.
        prompts: token ids, at least one each; shorter prompts of a batch are padded on the left.
        max_new_tokens: most tokens generated for a prompt.
        stop_ids: a generated token among these ends its row and is not returned.
        finished: called with a row's generated ids after each token; true ends the row (its tokens are
            returned).
        token_budget: most tokens, prompts padded and new ones counted, held by the cache of a batch.
        sampling: None for greedy decoding.
        numbers: of the prompts, for their draws; None: their places.
        agree: makes the same of the tokens chosen by processes that hold the model together, whose sums may
            differ by roundings.

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
        for batch in _batches(order, sizes, token_budget):
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
    return results


Chooser = Callable[[Tensor, Sequence[int]], list[int]]
"""(logits_BV, the prompt index of each row) -> the next token of each row"""


def _chooser(
    sampling: Sampling | None, numbers: Sequence[int], agree: Callable[[list[int]], list[int]] | None
) -> Chooser:
    choose = _own_chooser(sampling, numbers)
    return choose if agree is None else lambda logits_BV, rows: agree(choose(logits_BV, rows))


def _own_chooser(sampling: Sampling | None, numbers: Sequence[int]) -> Chooser:
    if sampling is None or sampling.temperature == 0:
        return lambda logits_BV, _: logits_BV.argmax(-1).tolist()
    temperature = sampling.temperature
    generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + number) for number in numbers]

    def draw(logits_BV: Tensor, rows: Sequence[int]) -> list[int]:
        # the largest of log p + Gumbel noise is a draw from p
        vocab = logits_BV.shape[-1]
        uniform_BV = torch.stack([torch.rand(vocab, generator=generators[i], dtype=torch.float64) for i in rows])
        gumbel_BV = -(-uniform_BV.clamp_min(1e-300).log()).log()
        return (logits_BV.double().cpu() / temperature + gumbel_BV).argmax(-1).tolist()

    return draw


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
    """Generate for the prompts of one batch, by index, into `results`."""
    rows = list(prompts)
    longest = max(len(prompt) for prompt in prompts.values())
    pads = [longest - len(prompts[i]) for i in rows]
    tokens_BT = torch.tensor([[0] * pad + list(prompts[i]) for pad, i in zip(pads, rows, strict=True)], device=device)
    pad_B = torch.tensor(pads, device=device)
    cache = model.new_cache(len(rows), longest + max_new_tokens)
    for count in itertools.count(1):
        x_BTD = model.hidden(tokens_BT, cache=cache, pad_B=pad_B)
        chosen = choose(model.head(x_BTD[:, -1]).float(), rows)
        alive: list[int] = []
        for b, (i, token) in enumerate(zip(rows, chosen, strict=True)):
            if token in stops:
                continue
            results[i].append(token)
            if finished is None or not finished(results[i]):
                alive.append(b)
        if not alive or count == max_new_tokens:
            return
        tokens_BT = torch.tensor([[chosen[b]] for b in alive], device=device)
        if len(alive) < len(rows):
            keep_B = torch.tensor(alive, device=device)
            cache.select(keep_B)
            pad_B = pad_B[keep_B]
            rows = [rows[b] for b in alive]
