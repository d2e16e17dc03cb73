"""A trained model as a person uses it: prompts in, text out; and how well it predicts a given text."""

import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch

from kiem.config.run import RunConfig
from kiem.data.tokenizer import Tokenizer
from kiem.errors import ConfigError
from kiem.generation.decode import Decoder
from kiem.generation.sample import Sampling, is_whole
from kiem.generation.text import TextStream
from kiem.model.transformer import Transformer
from kiem.runs import checkpoint
from kiem.runs.run import Run
from kiem.runtime import select_device

CACHE_BYTES = 1 << 30  # most memory for keys and values at once; more sequences than fit are decoded in batches
MAX_TOKENS = 1_000_000
MAX_SAMPLES = 10_000


class LanguageModel:
    """A model, its tokenizer, and (if it comes from a run) the run's configuration.

    Every text is a document of its own: an end of text stands before it, as in training. Computes in float32.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: RunConfig | None = None):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model's vocab_size is "
                f"{model.config.vocab_size}: use the tokenizer that the model was trained with"
            )
        self.model, self.tokenizer, self.config = model, tokenizer, config

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        n: int = 1,
    ) -> str | list[str]:
        """What follows the prompt (which is not repeated), up to an end of text, a stop string or max_tokens.

        One prompt gives a text, or with n > 1 a list of n texts; a list of prompts gives a list, the n texts of the
        first prompt first. A prompt in a list gets the text that it gets alone with the same seed. An end of text and a
        stop string are not part of the text, and a last character that max_tokens cut in two is left out. temperature 0
        takes the likeliest token always. seed None: another text each time. Past the context, see generation/decode.py.

        Raises ConfigError for a value out of range and a prompt longer than the context, DataError for text that the
        tokenizer does not know.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        stop = _check_request(max_tokens, stop, seed, n)
        one = isinstance(prompt, str) or not isinstance(prompt, Sequence)
        prompts: Sequence[Any] = [prompt] if one else prompt
        tokens = [self._tokens(text) for text in prompts]
        jobs = [(ids, s) for ids in tokens for s in _seeds(seed, n)]
        texts = [""] * len(jobs)
        for batch in self._batches(jobs, max_tokens):
            for job, piece in self._pieces(batch, jobs, sampling, max_tokens, stop):
                texts[job] += piece
        return texts[0] if one and n == 1 else texts

    def stream(
        self,
        prompt: str = "",
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> Iterator[str]:
        """The text of generate() in pieces, each as soon as it is certain. Arguments are checked at once."""
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        stop = _check_request(max_tokens, stop, seed, n=1)
        jobs = [(self._tokens(prompt), _seeds(seed, 1)[0])]
        return (piece for _, piece in self._pieces([0], jobs, sampling, max_tokens, stop))

    @torch.inference_mode()
    def score(self, text: str) -> dict[str, float | int | None]:
        """How well the model predicts a text that starts a document: {"nats", "tokens", "bytes", "bits_per_byte"}.

        nats: sum over the text's tokens of -log probability (natural logarithm); the end of text after it is not
        counted. bits_per_byte is None where the tokenizer does not give the text back. Each token sees all before it in
        the context; in a text longer than that, at least half a context. Raises ConfigError if the text is empty.
        """
        if not text:
            raise ConfigError("text is empty: there is nothing to score")
        ids = self._encode(text)
        T = self.model.config.context_length
        tokens = torch.tensor(ids, device=self.model.device)
        nats = 0.0
        scored = 1  # the end of text at the beginning is given
        with _inference(self.model):
            while scored < len(ids):
                start = 0 if scored == 1 else scored - max(1, T // 2)
                window = tokens[start : start + T + 1]
                targets_BT = window[None, scored - start :]
                nats += float(self.model(window[None, :-1], targets_BT=targets_BT, last=targets_BT.shape[1])[0])
                scored = start + len(window)
        n_bytes = len(text.encode())
        bits = nats / math.log(2) / n_bytes if self.tokenizer.decode(ids[1:]) == text else None
        return {"nats": nats, "tokens": len(ids) - 1, "bytes": n_bytes, "bits_per_byte": bits}

    def _encode(self, text: str) -> list[int]:
        """Tokens of a document that begins with this text."""
        if not isinstance(text, str):
            raise ConfigError(f"text {text!r} is of type {type(text).__name__}: use a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"text has a character that is not Unicode text ({text[error.start]!a} at position "
                f"{error.start}): a lone surrogate, or input that is not UTF-8"
            ) from None
        return [self.tokenizer.eot_id, *self.tokenizer.encode(text)]

    def _tokens(self, prompt: str) -> list[int]:
        ids, most = self._encode(prompt), self.model.config.context_length - 1
        if len(ids) - 1 > most:
            raise ConfigError(
                f"the prompt has {len(ids) - 1} tokens; with a context of {most + 1} this model takes at "
                f"most {most}: shorten the prompt"
            )
        return ids

    def _batches(self, jobs: list[tuple[list[int], int]], max_tokens: int) -> Iterator[list[int]]:
        """Indices of jobs that are decoded together: of like length, and as many as CACHE_BYTES has room for."""
        c = self.model.config
        slot_bytes = 2 * c.n_layers * c.n_kv_heads * c.head_dim * torch.float32.itemsize
        batch: list[int] = []
        for job in sorted(range(len(jobs)), key=lambda job: len(jobs[job][0])):
            slots = min(c.context_length, len(jobs[job][0]) + max_tokens)
            if batch and (len(batch) + 1) * slots * slot_bytes > CACHE_BYTES:
                yield batch
                batch = []
            batch.append(job)
        if batch:
            yield batch

    def _pieces(
        self, batch: list[int], jobs: list[tuple[list[int], int]], sampling: Sampling, max_tokens: int, stop: list[str]
    ) -> Iterator[tuple[int, str]]:
        """(job, piece of its text), as they come, for the jobs of one batch."""
        prompts, seeds = zip(*(jobs[job] for job in batch), strict=True)
        decoder = Decoder(self.model, prompts, sampling, seeds, self.tokenizer.vocab_size, max_tokens)
        streams = [TextStream(self.tokenizer, prompt[-1], stop) for prompt in prompts]
        for left in range(max_tokens, 0, -1):
            with _inference(self.model):
                new = decoder.step()
            done = set()
            for row, token in new:
                stream = streams[row]
                piece = "" if token == self.tokenizer.eot_id else stream.push(token)
                if token == self.tokenizer.eot_id or left == 1 or stream.stopped:
                    done.add(row)
                    piece += stream.end()
                if piece:
                    yield batch[row], piece
            decoder.finish(done)
            if len(done) == len(new):
                return


def load(run: Run, device: str = "auto") -> LanguageModel:
    """The model of a run (its named checkpoint, or its newest whole one), computing in float32, with its own tokenizer.

    A damaged newer checkpoint is passed over with a warning. Raises CheckpointError if there is none to load.
    """
    place = select_device(device)
    found = run.read(("model",))
    model = Transformer(run.config.model)
    checkpoint.restore(model.state_dict(), found.tensors["model"], found.path, "model")
    return LanguageModel(model.to(place).eval(), run.tokenizer, run.config)


@contextmanager
def _inference(model: Transformer) -> Iterator[None]:
    """No dropout, and float32: the weights are float32, and to cast them all for each token costs more than it saves.
    Afterwards the model is as it was, for training to continue."""
    training, dtype = model.training, model.compute_dtype
    if training:
        model.eval()
    model.compute_dtype = torch.float32
    try:
        yield
    finally:
        model.compute_dtype = dtype
        if training:
            model.train()


def _seeds(seed: int | None, n: int) -> list[int]:
    """A seed for each of n samples of one prompt: the first is `seed` itself, the others follow from it."""
    if seed is None:
        return [secrets.randbits(63) for _ in range(n)]
    others = [blake2b(f"{seed} {i}".encode(), digest_size=8).digest() for i in range(1, n)]
    return [seed, *(int.from_bytes(digest) >> 1 for digest in others)]


def _check_request(max_tokens: int, stop: str | Sequence[str], seed: int | None, n: int) -> list[str]:
    """The stop strings as a list. ConfigError naming every value out of range."""
    stop = [stop] if isinstance(stop, str) else stop
    problems = []
    if not (is_whole(max_tokens) and 1 <= max_tokens <= MAX_TOKENS):
        problems.append(f"max_tokens {max_tokens!r}: use a whole number from 1 to {MAX_TOKENS}")
    if not (is_whole(n) and 1 <= n <= MAX_SAMPLES):
        problems.append(f"n {n!r}: use a whole number from 1 to {MAX_SAMPLES} (texts for a prompt)")
    if seed is not None and not (is_whole(seed) and 0 <= seed < 2**63):
        problems.append(f"seed {seed!r}: use a whole number from 0 to {2**63 - 1}, or omit it")
    if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
        problems.append(f"stop {stop!r}: use strings that are not empty")
    if problems:
        raise ConfigError("\n".join(problems))
    return list(stop)
