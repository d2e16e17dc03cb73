"""Reads the formula of a row and computes it: the notation of the table, nothing else.

formula  = part { ("; " | ", else ") part }       part   = sum [ "if" condition ] | "else" sum
sum      = ["−"] term { ("+" | "−") term }         term   = row { ("·" | "/") row }
row      = power { power }, a matrix product       power  = atom { "²" | "³" | "ᵀ" | "⁻¹" | "⁻ᵀ" } [ "^" power ]
atom     = number | letter | function atom | "(" sum ")" | "|" sum "|" | "⟨" sum "⟩" | "√" atom | "Σ" term
"""

import math
import re

import torch

TOKEN = re.compile(r"\d+(?:\.\d+)?|[A-Za-zΑ-Ωα-ωϕ]+[\u0300-\u036f]?[₀-₉]*|⁻¹|⁻ᵀ|\S")
DEFINITION = re.compile(r", (?=[A-Za-z][\u0300-\u036f]? = )")
FUNCTIONS = {
    "exp": torch.exp, "ln": torch.log, "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "sinh": torch.sinh,
    "cosh": torch.cosh, "tanh": torch.tanh, "sign": torch.sgn, "σ": torch.sigmoid, "ψ": torch.digamma,
    "Φ": lambda x: (1 + torch.erf(x / math.sqrt(2))) / 2, "φ": lambda x: (-x * x / 2).exp() / math.sqrt(2 * math.pi),
    "conj": torch.conj, "Re": lambda z: z.real if z.is_complex() else z,
    "Im": lambda z: z.imag if z.is_complex() else z * 0, "softmax": lambda x: x.softmax(-1),
}  # fmt: skip
CONSTANTS = {"π": torch.tensor(math.pi, dtype=torch.float64), "i": torch.tensor(1j, dtype=torch.complex128)}
COMPARE = {"<": torch.lt, ">": torch.gt, "≤": torch.le, "≥": torch.ge}
POSTFIX = {
    "²": lambda t: t * t, "³": lambda t: t * t * t, "ᵀ": lambda t: t[None] if t.ndim == 1 else t.mT,
    "⁻¹": torch.linalg.inv, "⁻ᵀ": lambda t: torch.linalg.inv(t).mT,
}  # fmt: skip


def words(text):
    """What in a formula is English."""
    found = re.findall(r"[a-zA-Z]{2,}", re.sub(r"\b(if|else)\b|is finite", "", text))
    return [word for word in found if word not in FUNCTIONS]


def product(a, b):
    """Of matrices; a vector beside a row is a column."""
    return a[:, None] @ b if a.ndim == 1 and b.ndim == 2 and b.shape[0] == 1 else a @ b


class Formula:
    """`forward`: the formula of the operation, which may define letters. `letters`: values by name (tensors). `total`,
    `mean`: what Σ and ⟨ ⟩ mean."""

    def __init__(self, text, forward, letters, total=None, mean=None):
        main, *definitions = DEFINITION.split(text)
        self.definitions = dict(part.split(" = ", 1) for part in (*definitions, *DEFINITION.split(forward)[1:]))
        self.text, self.letters, self.total, self.mean = main, letters, total, mean

    def value(self):
        """The tensor."""
        return self.read(self.text)

    def read(self, text):
        outer, self.tokens = getattr(self, "tokens", None), TOKEN.findall(text.replace(", else", "; else"))[::-1]
        parts = [self.part()]
        while self.tokens:
            self.take(";")
            parts.append(self.part())
        self.tokens = outer
        found = parts[-1][0]
        for value, condition in reversed(parts[:-1]):
            found = torch.where(condition, value, found)
        return found

    def next(self):
        return self.tokens[-1] if self.tokens else ""

    def take(self, token=None):
        found = self.tokens.pop()
        assert token in (None, found), f"{self.text}: {token} expected, found {found}"
        return found

    def part(self):
        if self.next() == "else":
            self.take()
            return self.sum(), None
        value = self.sum()
        if self.next() != "if":
            return value, None
        self.take()
        left = self.sum()
        if self.next() == "is":
            self.take("is"), self.take("finite")
            return value, left.isfinite()
        holds = left.bool() if self.next() not in COMPARE else torch.tensor(True)
        while self.next() in COMPARE:
            compare, right = COMPARE[self.take()], self.sum()
            holds, left = holds & compare(left, right), right
        return value, holds

    def sum(self):
        negative = self.next() == "−"
        if negative:
            self.take()
        found = -self.term() if negative else self.term()
        while self.next() in ("+", "−"):
            found = found + self.term() if self.take() == "+" else found - self.term()
        return found

    def term(self):
        found = self.row()
        while self.next() in ("·", "/"):
            found = found * self.row() if self.take() == "·" else found / self.row()
        return found

    def row(self):
        found = self.power()
        while self.next() in ("(", "√") or (self.next()[:1].isalpha() and self.next() not in ("if", "else", "is")):
            found = product(found, self.power())
        return found

    def power(self):
        found = self.atom()
        while self.next() in POSTFIX:
            found = POSTFIX[self.take()](found)
        if self.next() == "^":
            self.take()
            found = found ** self.power()
        return found

    def atom(self):
        token = self.take()
        if token in "(|⟨":
            found = self.sum()
            self.take({"(": ")", "|": "|", "⟨": "⟩"}[token])
            return {"(": found, "|": found.abs(), "⟨": self.mean and self.mean(found)}[token]
        if token == "Σ":
            return self.total(self.term())
        if token == "√":
            return self.atom().sqrt()
        if token in FUNCTIONS and token not in self.letters:
            return FUNCTIONS[token](self.atom())
        if token[0].isdigit():
            return torch.tensor(float(token), dtype=torch.float64)
        if token in self.letters:
            return self.letters[token]
        return CONSTANTS[token] if token in CONSTANTS else self.read(self.definitions[token])
