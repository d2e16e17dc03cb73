"""From tokens to the next tokens: a batch of sequences with one cache.

Each sequence gets what it would get alone: rows of unequal length are padded on the left, and attention, positions and
chance of a row do not see the others.

Past the context. A model sees at most `context_length` tokens. A longer sequence continues from its newest
`context_length // 2` tokens, computed anew as if they were its beginning; so it always sees between half a context and
a whole one. (Dropping one token at a time would mean computing everything anew for each token, since the keys and
values of a token hold something of all tokens before it.)

B batch (sequences that are not finished), T time, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kiem.errors import NumericsError
from kiem.generation.sample import Sampling, draw, shape_logits
from kiem.model.cache import Cache
from kiem.model.transformer import Transformer


class Decoder:
    """Gives the next token of every sequence, step by step.

    prompts: token ids of each sequence, 1 to context_length of them. seeds: one a sequence. vocab_size: tokens from
    here on are never chosen (the embedding may have more rows than the tokenizer has tokens). max_tokens: most steps
    that will be asked for; sizes the cache.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        vocab_size: int,
        max_tokens: int,
    ):
        self.model, self.sampling, self.vocab_size, self.steps_left = model, sampling, vocab_size, max_tokens
        self.context_length = model.config.context_length
        self.device = model.device
        self.rows = list(range(len(prompts)))
        self.windows = [list(prompt) for prompt in prompts]
        # On the CPU always: the same seed gives the same text on every device.
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.cache: Cache | None = None
        self.newest_B1 = self.positions_B1 = torch.empty(0, 1, dtype=torch.int64)  # set by the first step
        self.seen_BV: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=self.device)
            for row, prompt in enumerate(prompts):
                self.seen_BV[row, list(prompt)] = True

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """(sequence, its next token) of every unfinished sequence. NumericsError if the logits are not finite."""
        logits_BV = self._next_logits()[:, : self.vocab_size]
        if not bool(logits_BV.isfinite().all()):
            raise NumericsError(
                "the model's logits are not finite: its weights are damaged, or training had diverged. "
                "Use an earlier checkpoint."
            )
        tokens_B = self._choose(shape_logits(logits_BV, self.sampling, self.seen_BV))
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, tokens_B[:, None], True)
        self.newest_B1 = tokens_B[:, None]
        self.steps_left -= 1
        tokens = tokens_B.tolist()
        for window, token in zip(self.windows, tokens, strict=True):
            window.append(token)
        return list(zip(self.rows, tokens, strict=True))

    @torch.inference_mode()
    def finish(self, done: set[int]) -> None:
        """These sequences want no more tokens. What is left of the batch becomes smaller and faster."""
        keep = [i for i, row in enumerate(self.rows) if row not in done]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        self.windows = [self.windows[i] for i in keep]
        self.generators = [self.generators[i] for i in keep]
        if not keep:
            self.cache = None
            return
        index = torch.tensor(keep, device=self.device)
        self.newest_B1, self.positions_B1 = self.newest_B1[index], self.positions_B1[index]
        if self.cache is not None:
            self.cache.keep(index)
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[index]

    def _choose(self, logits_BV: Tensor) -> Tensor:
        if self.sampling.greedy:
            return logits_BV.argmax(-1)
        uniform = [torch.rand((), generator=g, dtype=torch.float64) for g in self.generators]
        return draw(logits_BV, torch.stack(uniform).to(logits_BV.device))

    def _next_logits(self) -> Tensor:
        """(B, V) logits after the last token of each window, float32."""
        full = self.cache is None or self.cache.length == self.cache.valid_BS.shape[1]
        if full or any(len(window) > self.context_length for window in self.windows):
            return self._begin()
        self.positions_B1 = self.positions_B1 + 1
        return self.model(self.newest_B1, positions_BT=self.positions_B1, cache=self.cache, last=1)[:, 0]

    def _begin(self) -> Tensor:
        """Compute the windows from their first token, into a new cache; those past the context are shortened first."""
        keep = max(1, self.context_length // 2)
        self.windows = [w[-keep:] if len(w) > self.context_length else w for w in self.windows]
        T = max(map(len, self.windows))
        tokens_BT = torch.tensor([[0] * (T - len(w)) + w for w in self.windows], device=self.device)
        padding_B1 = torch.tensor([[T - len(w)] for w in self.windows], device=self.device)
        slots_T = torch.arange(T, device=self.device)
        positions_BT = (slots_T - padding_B1).clamp_min(0)
        slots = min(self.context_length, T + self.steps_left)
        self.cache = None  # the old one is free before the new one is made
        self.cache = Cache(self.model.config, len(self.windows), slots, self.device, self.model.compute_dtype)
        self.positions_B1 = positions_BT[:, -1:]
        valid_BT = slots_T >= padding_B1
        return self.model(tokens_BT, positions_BT=positions_BT, cache=self.cache, valid_BT=valid_BT, last=1)[:, 0]
