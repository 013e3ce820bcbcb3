"""Exact, batched log-probabilities of continuations, without an evaluation library.

Requests share a row if their inputs are equal or one is a prefix of the other, since models are causal in evaluation
mode. Rows are sorted by length and batched under a budget of padded tokens; the output head runs only at scored
positions.

Shapes: B rows of a batch, T padded length, D model width, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from suite.data.tokenizers import Tokenizer
from suite.errors import UserError
from suite.inference.batching import batches_of, evaluation_mode
from suite.models.transformer import Transformer

Request = tuple[Sequence[int], Sequence[int]]
"""(context ids, continuation ids)"""

LOGITS_AT_ONCE = 1 << 25  # fp32 elements of one output-head call: 128 MiB


def encode_pair(
    tokenizer: Tokenizer,
    context: str,
    continuation: str,
    encode: Callable[[str], list[int]] | None = None,
) -> tuple[list[int], list[int]]:
    """Encode a context, after an end-of-text token, and its continuation.

    Together they are the tokens of the whole text, split after the context. Spaces at the end of the context move to
    the continuation, as in lm-eval, since word tokens include the space before them.

    Args:
        tokenizer: The corpus's tokenizer.
        context: Text that is not scored; may be empty.
        continuation: Text that is scored.
        encode: Used instead of `tokenizer.encode`, for instance a cached version of it.

    Returns:
        Context ids (at least one) and continuation ids.

    Raises:
        UserError: The tokenizer encodes the text to no tokens.
    """
    encode = encode or tokenizer.encode
    bare = context.rstrip(" ")
    continuation = context[len(bare) :] + continuation
    head = encode(bare) if bare else []
    if tokenizer.splits_at_spaces and continuation.startswith(" ") and not continuation[1:2].isspace():
        # Tokens begin at single spaces, so the parts can be encoded separately and contexts cached.
        return [tokenizer.eot_id, *head], encode(continuation)
    whole = tokenizer.encode(bare + continuation)
    if whole[: len(head)] == head and len(whole) > len(head):
        return [tokenizer.eot_id, *head], whole[len(head) :]
    if not continuation:
        return [tokenizer.eot_id, *head], []
    if not whole:
        raise UserError(
            f"tokenizer {tokenizer.kind}: encodes {bare + continuation!r:.80} to no tokens; use another one"
        )
    # A token crosses the boundary: scoring starts with that token, so that no part of the continuation is lost.
    shared = 0
    while shared < min(len(head), len(whole) - 1) and head[shared] == whole[shared]:
        shared += 1
    return [tokenizer.eot_id, *whole[:shared]], whole[shared:]


def windows(context: Sequence[int], continuation: Sequence[int], max_tokens: int) -> list[Request]:
    """Split a request into requests of at most `max_tokens` input tokens; their log-probabilities add up.

    Args:
        context: Token ids before the continuation; truncated at its start if it is too long.
        continuation: Token ids to score. If it does not fit, it is scored in parts, each after as many preceding tokens
            as fit.
        max_tokens: Maximum number of input tokens; the last continuation token is never an input.

    Returns:
        One request, or several that cover the continuation once.
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


def score(
    model: Transformer,
    requests: Sequence[Request],
    token_budget: int = 16384,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[tuple[float, bool]]:
    """Compute the log-probability of each continuation, and whether greedy decoding produces it.

    Args:
        model: A Transformer of any family; it is in evaluation mode during the call.
        requests: (context ids, continuation ids); a context has at least one token, such as the end-of-text token.
        token_budget: Maximum number of padded tokens in a batch; a longer row is a separate batch.
        on_progress: Called with the share of the batches that are done, after every batch.

    Returns:
        For each request, in order: the sum of log-probabilities in nats (computed in fp32), and whether greedy decoding
        gives the continuation. (0.0, True) for an empty continuation.
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
        batches = list(_plan(rows, stems, token_budget))
        for number, (batch, is_shared) in enumerate(batches, start=1):
            hidden = _shared_hidden if is_shared else _plain_hidden
            x_BTD = hidden(model, [rows[row] for row in batch], [stems[row] for row in batch], device)
            first = [stems[row] - 1 if is_shared else 0 for row in batch]
            in_batch = [request for row in batch for request in members[row]]
            cells = [
                (b * x_BTD.shape[1] + len(requests[request][0]) - 1 - first[b] + offset, token)
                for b, row in enumerate(batch)
                for request in members[row]
                for offset, token in enumerate(requests[request][1])
            ]
            log_p_N, top_N = _score_cells(model, x_BTD.flatten(0, 1), cells)
            lengths = [len(requests[request][1]) for request in in_batch]
            for request, log_p, top in zip(in_batch, log_p_N.split(lengths), top_N.split(lengths), strict=True):
                results[request] = (float(log_p.sum()), bool(top.all()))
            on_progress(number / len(batches))
    return results


def _input_ids(context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
    if not context:
        raise ValueError("a context needs at least one token; begin it with the end-of-text token")
    return (*context, *continuation[:-1])


def _shared_rows(inputs: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return the distinct inputs that are not a prefix of another, and for each input the row that contains it."""
    rows: list[tuple[int, ...]] = []
    row_of = [0] * len(inputs)
    # In descending order an input directly follows the longer ones that begin with it.
    for request in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        ids = inputs[request]
        if not rows or rows[-1][: len(ids)] != ids:
            rows.append(ids)
        row_of[request] = len(rows) - 1
    return rows, row_of


def _plan(rows: Sequence[tuple[int, ...]], stems: Sequence[int], token_budget: int) -> Iterator[tuple[list[int], bool]]:
    """Yield batches of row indices, and whether their stems are read once and shared: if that halves the tokens.

    `stems` holds, for each row, the number of tokens before its first scored position; 0 if nothing in it is scored.
    """
    by_stem: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(stems):
        if length:
            by_stem.setdefault(rows[row][:length], []).append(row)
    separate: list[int] = []
    sharing: list[list[int]] = []
    for stem, family in by_stem.items():
        tokens = sum(len(rows[row]) for row in family)
        if tokens >= 2 * (tokens - (len(family) - 1) * len(stem)):
            size = max(1, token_budget // max(len(rows[row]) for row in family))
            sharing += [family[start : start + size] for start in range(0, len(family), size)]
        else:
            separate += family
    separate.sort(key=lambda row: -len(rows[row]))
    for batch in batches_of(separate, [len(row) for row in rows], token_budget):
        yield batch, False
    sharing.sort(key=lambda family: -stems[family[0]])
    batch = []
    for family in sharing:
        longest = max(len(rows[row]) for row in [*batch, *family])
        if batch and (len(batch) + len(family)) * longest > token_budget:
            yield batch, True
            batch = []
        batch += family
    if batch:
        yield batch, True


def _plain_hidden(model: Transformer, rows: Sequence[Sequence[int]], _: Sequence[int], device: torch.device) -> Tensor:
    """Return the hidden states [B, T, D] of whole rows; in a causal model, padding on the right needs no mask."""
    return model.hidden(_padded(rows, device))


def _shared_hidden(
    model: Transformer, rows: Sequence[Sequence[int]], stems: Sequence[int], device: torch.device
) -> Tensor:
    """Return the hidden states [B, 1 + U, D] of each row's last stem token and of the at most U tokens after it.

    Each distinct stem is read once; every row that begins with it uses its keys and values.
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
    """Return rows of token ids as one tensor, padded on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _score_cells(model: Transformer, x_PD: Tensor, cells: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return, for each (position in x, target), log p of the target in fp32 and whether the target is the argmax."""
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
