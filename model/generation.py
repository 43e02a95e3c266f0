"""Text from a model: a prompt in chunks, then token by token, for several rows of different lengths at once."""

from collections.abc import Callable, Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from model.cache import KVCache
from model.sampling import GREEDY, Sampling, draws

COMPILED: WeakKeyDictionary = WeakKeyDictionary()  # model -> its compiled step


@torch.no_grad()
def stream(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0,
    stop_tokens: Sequence[int] = (), use_cache: bool = True, cache_dtype: torch.dtype | None = None, chunk: int = 512,
    compiled: bool = False, vocab_size: int | None = None,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Yield the next token of each of `prompts`, step by step; None in a row that has ended with a stop token.

    `model` is a Transformer. Row i is drawn by seed + i, whatever the other rows are. Prompts pass through the model in
    pieces of `chunk` tokens. `compiled` compiles the step of one token (CUDA graphs on a GPU); without `use_cache` each
    step passes over everything again, which gives the same tokens. Tokens from `vocab_size` on are padding of the
    model's vocabulary, and never drawn. ValueError for an empty prompt.
    """
    if min(map(len, prompts), default=0) == 0:
        raise ValueError("a prompt must have at least one token")
    training, device = model.training, model.embedding.weight.device
    rows, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
    uniforms = draws(range(seed, seed + len(rows)), max_new_tokens, device)
    seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, rows, strict=True):
        row[torch.tensor(prompt, device=device)] = True
    cache = model.new_cache(len(rows), dtype=cache_dtype) if use_cache else None
    model.eval()
    try:
        logits = prefill(model, rows, cache, chunk) if cache else whole_pass(model, rows)
        step = compile_step(model, cache, max_new_tokens) if compiled and cache else decode_step
        for i in range(max_new_tokens):
            chosen = sampling.choose(logits[:, :vocab_size], uniforms[i], seen[:, :vocab_size])
            seen.scatter_(1, chosen[:, None], True)
            tokens = chosen.tolist()
            ended = [done or token in stop_tokens for done, token in zip(ended, tokens, strict=True)]
            yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
            if all(ended) or i == max_new_tokens - 1:
                return
            if cache:
                logits = step(model, chosen[:, None], cache)
            else:
                rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
                logits = whole_pass(model, rows)
    finally:
        model.train(training)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return `rows` as [B, longest], each from the left with zeros after it."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def prefill(model: nn.Module, rows: Sequence[Sequence[int]], cache: KVCache, chunk: int) -> Tensor:
    """Fill the cache with `rows` in pieces of `chunk` tokens; return the logits [B, V] of each row's last token."""
    tokens, lengths = padded(rows, cache.lengths.device), torch.tensor([len(row) for row in rows])
    logits = None
    for start in range(0, tokens.size(1), chunk):
        piece = tokens[:, start : start + chunk]
        counts = (lengths - start).clamp(0, piece.size(1)).to(piece.device)
        full = bool((lengths >= start + piece.size(1)).all())
        new = model.decode(piece, cache, None if full else counts)
        logits = new if logits is None else torch.where(counts[:, None] > 0, new, logits)
    return logits


def whole_pass(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits [B, V] of each row's last token, without a cache."""
    logits = model.logits(padded(rows, model.embedding.weight.device))
    return torch.stack([row[len(tokens) - 1] for row, tokens in zip(logits, rows, strict=True)])


def decode_step(model: nn.Module, tokens: Tensor, cache: KVCache) -> Tensor:
    """Return the logits [B, V] after one more token [B, 1] of each row."""
    return model.decode(tokens, cache)


def compile_step(model: nn.Module, cache: KVCache, n_tokens: int) -> Callable:
    """Return `decode_step` compiled, with CUDA graphs on a GPU, for `n_tokens` more tokens in `cache`."""
    cache.reserve(n_tokens)
    cache.fix_shapes()
    graphs = cache.lengths.is_cuda
    if model not in COMPILED:
        options = {"mode": "reduce-overhead" if graphs else None, "isolate_recompiles": True, "recompile_limit": 64}
        COMPILED[model] = torch.compile(decode_step, fullgraph=True, dynamic=False, **options)
    if not graphs:
        return COMPILED[model]
    for tensor in cache.tensors():  # CUDA graphs refuse to write to inputs that might move
        torch._dynamo.mark_static_address(tensor)

    def step(*inputs):
        torch.compiler.cudagraph_mark_step_begin()
        return COMPILED[model](*inputs).clone()  # the next run overwrites it

    return step
