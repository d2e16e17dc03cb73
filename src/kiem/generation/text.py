"""From tokens to text while they come: whole characters only, and stop strings that may span tokens."""

from collections.abc import Sequence

from kiem.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class TextStream:
    """Turns tokens into pieces of text.

    A byte-level token can end inside a character; its text then waits for the rest. Text that could be the beginning of
    a stop string waits too. The pieces of all calls, joined, are the text before the first stop string; nothing that
    was given out is ever taken back.
    """

    def __init__(self, tokenizer: Tokenizer, before: int, stop: Sequence[str] = ()):
        """before: the token that comes before the text (decoders may treat the first token of a text differently)."""
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        self._ids = [before]  # since the newest point where everything was given out
        self._n_read = len(tokenizer.decode(self._ids))  # characters of the text of _ids that were read
        self._held = ""  # whole characters that could begin a stop string

    def push(self, token: int) -> str:
        """The text that is certain after this token. Sets `stopped` when a stop string is complete."""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        whole = _without_unfinished(text)
        new = whole[self._n_read :]
        self._n_read = max(self._n_read, len(whole))
        if len(whole) == len(text):
            self._ids = [token]
            self._n_read = len(self.tokenizer.decode(self._ids))
        return self._release(new)

    def end(self) -> str:
        """The text that waited in vain for the rest of a stop string. An unfinished character is left out."""
        held, self._held = self._held, ""
        return held

    def _release(self, new: str) -> str:
        text = self._held + new
        if not self.stop or not text:
            return text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop if stop in text]
        if found:  # the first to be complete, so that it does not matter how the text was cut into tokens
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        wait = max(_overlap(text, stop) for stop in self.stop)
        self._held = text[len(text) - wait :]
        return text[: len(text) - wait]


def _without_unfinished(text: str) -> str:
    """Leave out replacement characters at the end: up to 3 bytes may wait for the rest of their character. (A decoder
    gives one for all of them, or one for each.)"""
    n = len(text) - len(text.rstrip(REPLACEMENT))
    return text[: len(text) - min(n, 3)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
