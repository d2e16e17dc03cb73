"""Documents of `kiem explain --html` made by hand: the small sigmoid program, a deep GPT, and a hostile one."""

import math
from random import Random

HOSTILE = "</script><script>alert(1)</script>\u2028<img src=x onerror=alert(2)>"


def source(line: int = 1, text: str = "y = f(x)", function: str = "<module>", file: str = "program.py") -> dict:
    return {"file": file, "line": line, "function": function, "text": text}


def gradient(data=None, shape=(), norm: float | None = None) -> dict:
    if norm is None:
        norm = abs(data)
    return {
        "shape": list(shape),
        "dtype": "float32",
        "norm": norm,
        "mean": norm,
        "min": -norm,
        "max": norm,
        "nonfinite": 0,
        "data": data,
    }


class Builder:
    """Adds values, operations and steps in order; ids are positions."""

    def __init__(self, title: str = "program.py") -> None:
        self.document = {
            "title": title,
            "summary": {"torch": "2.13", "device": "cpu"},
            "notes": [],
            "failure": None,
            "values": [],
            "ops": [],
            "backwards": [],
            "repeats": [],
            "verdicts": None,
        }

    def value(self, name=None, shape=(), data=None, producer=None, **more) -> int:
        index = len(self.document["values"])
        count = math.prod(shape)
        stats = {
            "norm": abs(data) if isinstance(data, float) else math.sqrt(count),
            "mean": 0.0,
            "min": -1.0,
            "max": 1.0,
            "nonfinite": 0,
        }
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        self.document["values"].append(
            {
                "id": index,
                "name": name,
                "rank": {0: "scalar", 1: "vector", 2: "matrix"}.get(len(shape), f"{len(shape)}-D"),
                "shape": list(shape),
                "dtype": "float32",
                "device": "cpu",
                "strides": strides,
                "bytes": 4 * count,
                "storage": index,
                "version": 0,
                "requires_grad": True,
                "leaf": producer is None,
                "parameter": False,
                "view_of": None,
                "producer": producer,
                "saved_by": [],
                "stats": stats,
                "data": data,
                "hooks": [],
            }
            | more
        )
        return index

    def op(self, label: str, inputs: list[tuple[str, int]], shape=(), data=None, name=None, **more) -> int:
        """Returns the value that the operation makes."""
        index = len(self.document["ops"])
        out = self.value(name, shape, data, producer=index)
        self.document["ops"].append(
            {
                "id": index,
                "label": label,
                "name": f"aten.{label}.default",
                "kind": "op",
                "inputs": [list(i) for i in inputs],
                "outputs": [out],
                "attributes": {},
                "source": source(index + 1),
                "module": "",
                "module_class": "",
                "parent": None,
                "region": "",
                "grad_enabled": True,
                "random": False,
                "mutates": [],
                "node": label.capitalize() + "Backward0",
                "closed_form": True,
                "forward_formula": None,
                "derivatives": {},
                "symbols": {},
                "saved_bytes": 0,
                "error": "",
            }
            | more
        )
        for _, value in inputs:
            self.document["values"][value]["saved_by"].append(index)
        return out

    def producer(self, value: int) -> int:
        return self.document["values"][value]["producer"]


def step(op, node, into, out=(), targets=(), leaf=None, kernels=("aten.mul.Tensor",)) -> dict:
    return {
        "op": op,
        "node": node,
        "leaf": leaf,
        "into": list(into),
        "out": list(out),
        "targets": [None if t is None else {"step": t} for t in targets],
        "kernels": list(kernels),
        "changed_by_hook": False,
    }


def sigmoid() -> dict:
    """a = sigmoid(w·x + b), loss = a·w + a, at w = 0.5, x = 2, b = -1: a = 0.5; gradients join at a and at w."""
    make = Builder()
    x = make.value("x", data=2.0, requires_grad=False)
    w, b = make.value("w", data=0.5), make.value("b", data=-1.0)
    wx = make.op(
        "mul",
        [("self", w), ("other", x)],
        data=1.0,
        forward_formula="y = a · b",
        derivatives={"self": "g · b", "other": "g · a"},
        symbols={"self": "a", "other": "b", "0": "y"},
        saved_bytes=4,
    )
    z = make.op(
        "add",
        [("self", wx), ("other", b)],
        data=0.0,
        name="z",
        forward_formula="y = a + b",
        derivatives={"self": "g", "other": "g"},
        symbols={"self": "a", "other": "b", "0": "y"},
    )
    a = make.op(
        "sigmoid",
        [("self", z)],
        data=0.5,
        name="a",
        forward_formula="y = 1 / (1 + exp(−x))",
        derivatives={"self": "g · y · (1 − y)"},
        symbols={"self": "x", "0": "y"},
        saved_bytes=4,
    )
    left = make.op(
        "mul",
        [("self", a), ("other", w)],
        data=0.25,
        name="left",
        forward_formula="y = a · b",
        derivatives={"self": "g · b", "other": "g · a"},
        symbols={"self": "a", "other": "b", "0": "y"},
        saved_bytes=8,
    )
    loss = make.op(
        "add",
        [("self", left), ("other", a)],
        data=0.75,
        name="loss",
        forward_formula="y = a + b",
        derivatives={"self": "g", "other": "g"},
        symbols={"self": "a", "other": "b", "0": "y"},
    )
    one, g = gradient(1.0), gradient
    make.document["backwards"] = [
        {
            "source": source(9, "loss.backward()"),
            "roots": [loss],
            "steps": [
                step(4, "AddBackward0", [one], [g(1.0), g(1.0)], [1, 2]),
                step(3, "MulBackward0", [one], [g(0.5), g(0.5)], [2, 6]),
                step(2, "SigmoidBackward0", [g(1.5)], [g(0.375)], [3], kernels=["aten.sigmoid_backward.default"]),
                step(1, "AddBackward0", [g(0.375)], [g(0.375), g(0.375)], [4, 5]),
                step(0, "MulBackward0", [g(0.375)], [g(0.75), None], [6, None]),
                step(None, "AccumulateGrad", [g(0.375)], leaf=b),
                step(None, "AccumulateGrad", [g(1.25)], leaf=w),
            ],
        }
    ]
    return make.document


def gpt(layers: int = 48) -> dict:
    """The shape of a GPT's training step: about 38 operations a block, two residual joins, shared cos and sin."""
    make = Builder("gpt2-xl, one step")
    width, time, heads = 1600, 128, 25

    def parameter(name, *shape):
        return make.value(name, shape, parameter=True)

    tokens = make.value("tokens", (1, time), dtype="int64", requires_grad=False)
    mask = make.value("mask", (time, time), requires_grad=False)
    inside = ""
    made: list[tuple[int, list[int]]] = []

    def op(label, *inputs, shape=(1, time, width), cls="", **more):
        out = make.op(
            label,
            [(("self", "other", "weight", "bias")[i], v) for i, v in enumerate(inputs)],
            shape,
            module=inside,
            module_class=cls,
            source=source(20 + len(make.document["ops"]) % 60, f"x = {label}(x)", "forward", "model/transformer.py"),
            forward_formula=f"y = {label}(a, b)",
            derivatives={"self": "g · bᵀ", "other": "aᵀ · g"},
            symbols={"self": "a", "other": "b", "0": "y"},
            saved_bytes=4 * time * width,
            **more,
        )
        made.append((make.producer(out), list(inputs)))
        return out

    def linear(x, name, n_in, n_out):
        nonlocal inside
        outer, inside = inside, f"{inside}.{name}"
        weight, bias = parameter(f"{inside}.weight", n_out, n_in), parameter(f"{inside}.bias", n_out)
        x = op("view", x, shape=(time, n_in), cls="Linear")
        t = op("t", weight, shape=(n_in, n_out), cls="Linear")
        x = op("addmm", bias, x, t, shape=(time, n_out), cls="Linear")
        x = op("view", x, shape=(1, time, n_out), cls="Linear")
        inside = outer
        return x

    def norm(x, name):
        nonlocal inside
        outer, inside = inside, f"{inside}.{name}"
        x = op(
            "native_layer_norm",
            x,
            parameter(f"{inside}.weight", width),
            parameter(f"{inside}.bias", width),
            cls="LayerNorm",
        )
        inside = outer
        return x

    inside = "model.embed"
    x = op("embedding", parameter("model.embed.weight", 50257, width), tokens, cls="Embedding")
    for layer in range(layers):
        inside = block = f"model.blocks.{layer}"
        h = norm(x, "norm1")
        inside = block + ".attn"
        q, k, v = (linear(h, n, width, width) for n in ("query", "key", "value"))
        q, k, v = (op("transpose", t, shape=(1, heads, time, 64), cls="Attention") for t in (q, k, v))
        k = op("transpose", k, shape=(1, heads, 64, time), cls="Attention")
        scores = op("masked_fill", op("bmm", q, k, shape=(1, heads, time, time)), mask, shape=(1, heads, time, time))
        y = op(
            "bmm",
            op("_softmax", op("div", scores, shape=(1, heads, time, time)), shape=(1, heads, time, time)),
            v,
            shape=(1, heads, time, 64),
        )
        y = linear(op("view", op("transpose", y, cls="Attention")), "out", width, width)
        inside = block
        x = op("add", x, y, cls="Block")
        h = norm(x, "norm2")
        inside = block + ".mlp"
        h = linear(
            op("gelu", linear(h, "up", width, 4 * width), shape=(1, time, 4 * width), cls="MLP"),
            "down",
            4 * width,
            width,
        )
        inside = block
        x = op("add", x, h, cls="Block")
    inside = "model"
    x = norm(x, "norm")
    x = linear(x, "head", width, 50257)
    inside = ""
    x = op("_log_softmax", x, shape=(time, 50257))
    loss = op("nll_loss_forward", x, tokens, shape=(), name="loss")
    make.document["backwards"] = [_backward(make, made, loss)]
    return make.document


def _backward(make: Builder, made, loss: int) -> dict:
    """Reverse order, a step for each operation and each leaf; norms fall slowly with depth."""
    values = make.document["values"]
    position, leaves = {}, []
    for op, _ in reversed(made):
        position[op] = len(position)
    for _, inputs in made:
        leaves += [
            v for v in inputs if values[v]["producer"] is None and values[v]["requires_grad"] and v not in leaves
        ]
    at_leaf = {v: len(position) + i for i, v in enumerate(leaves)}
    steps = []
    for op, inputs in reversed(made):
        norm = 3.0 * 0.998 ** len(steps)
        out, targets = [], []
        for v in inputs:
            goal = at_leaf.get(v) if values[v]["producer"] is None else position[values[v]["producer"]]
            out.append(None if goal is None else gradient(None, values[v]["shape"], norm))
            targets.append(goal)
        shape = values[make.document["ops"][op]["outputs"][0]]["shape"]
        steps.append(step(op, make.document["ops"][op]["node"], [gradient(None, shape, norm)], out, targets))
    steps += [step(None, "AccumulateGrad", [gradient(None, values[v]["shape"], 0.5)], leaf=v) for v in leaves]
    return {"source": source(99, "loss.backward()"), "roots": [loss], "steps": steps}


def hostile() -> dict:
    """Every text of the document is an attack."""
    make = Builder(HOSTILE)
    w = make.value(HOSTILE, (2,), [math.nan, math.inf], parameter=True, hooks=[HOSTILE], dtype=HOSTILE, device=HOSTILE)
    y = make.op(
        HOSTILE,
        [(HOSTILE, w)],
        (2,),
        [1.0, -math.inf],
        name="\u202egnp.exe",
        module="<script>alert(1)</script>",
        module_class=HOSTILE,
        source=source(1, HOSTILE, HOSTILE, HOSTILE),
        attributes={HOSTILE: HOSTILE},
        forward_formula=HOSTILE,
        derivatives={HOSTILE: HOSTILE},
        symbols={HOSTILE: HOSTILE},
        node=HOSTILE,
        error=HOSTILE,
        region=HOSTILE,
    )
    make.document |= {
        "notes": [HOSTILE],
        "summary": {HOSTILE: HOSTILE},
        "verdicts": {0: {"verdict": "wrong", "text": HOSTILE}},
        "failure": {
            "kind": HOSTILE,
            "message": HOSTILE,
            "source": source(1, HOSTILE, HOSTILE, HOSTILE),
            "explanation": HOSTILE,
        },
        "repeats": [{"first": 0, "last": 0, "times": 3}],
    }
    make.document["backwards"] = [
        {
            "source": source(2, HOSTILE),
            "roots": [y],
            "steps": [
                step(
                    0,
                    HOSTILE,
                    [gradient(None, (2,), math.nan)],
                    [gradient(None, (2,), math.inf)],
                    [1],
                    kernels=[HOSTILE],
                ),
                step(None, HOSTILE, [gradient(None, (2,), math.inf)], leaf=w),
            ],
        }
    ]
    return make.document


def peculiar() -> dict:
    """A custom Function and what ran in it, an optimizer, random and in-place operations, two backwards, an error."""
    make = Builder("peculiar.py")
    x = make.value("x", (4, 8), requires_grad=False)
    w = make.value("w", (8, 3), parameter=True)
    h = make.op(
        "Clamp", [("x", x), ("w", w)], (4, 3), kind="function", name="h", module="net.clamp", module_class="Clamp"
    )
    outer = make.producer(h)
    inner = make.op("mm", [("self", x), ("mat2", w)], (4, 3), parent=outer, module="net.clamp", node="")
    make.op("clamp", [("self", inner)], (4, 3), parent=outer, module="net.clamp", node="")
    d = make.op("native_dropout", [("input", h)], (4, 3), random=True, module="net", module_class="Net")
    d = make.op("mul_", [("self", d)], (4, 3), mutates=[d], region="checkpoint", module="net", module_class="Net")
    loss = make.op("sum", [("self", d)], name="loss", data=2.5)
    make.op(
        "linear",
        [("input", h), ("weight", w)],
        (4, 4),
        error="RuntimeError: shapes (4, 3) and (8, 3) cannot be multiplied",
    )
    make.op("_foreach_add_", [("self[0]", w)], (8, 3), region="optimizer", grad_enabled=False, mutates=[w], node="")
    small = gradient([[0.1, -0.2, 0.3]] * 4, (4, 3), 0.75)
    steps = [
        step(5, "SumBackward0", [gradient(1.0)], [small], [1]),
        step(4, "MulBackward0", [small], [small], [2]),
        step(3, "NativeDropoutBackward0", [small], [small], [3]),
        step(0, "ClampBackward", [small], [None, gradient(None, (8, 3), 1.5)], [None, 4]),
        step(None, "AccumulateGrad", [gradient(None, (8, 3), 1.5)], leaf=w),
    ]
    make.document["backwards"] = [
        {"source": source(20, "loss.backward(retain_graph=True)"), "roots": [loss], "steps": steps},
        {"source": source(21, "loss.backward()"), "roots": [loss], "steps": steps},
    ]
    failed = source(12, "y = linear(h, w)", "forward")
    make.document["failure"] = {
        "kind": "RuntimeError",
        "message": "shapes (4, 3) and (8, 3) cannot be multiplied",
        "source": failed,
        "explanation": "The last dimension of h, 3, must equal the last of w, 8.",
    }
    return make.document


def chance(seed: int) -> dict:
    """Any graph: modules called again, far uses, gradients to some, functions with operations inside."""
    random = Random(seed)
    make = Builder(f"chance {seed}")
    values = [make.value(f"w{i}", (2, 2), parameter=random.random() < 0.5) for i in range(4)]
    modules = ["", "a", "a.b", "a.b.c", "a.d", "e", "e.f"]
    outer = None
    for i in range(random.randint(1, 90)):
        name = random.choice(["mm", "add", "relu", "view"])
        inputs = [(f"in{k}", random.choice(values[-30:] + values[:4])) for k in range(random.randint(0, 3))]
        chosen = random.random()
        more = {"kind": "function"} if chosen < 0.1 else {"parent": outer} if outer is not None and chosen < 0.4 else {}
        values.append(make.op(name, inputs, (2, 2), module=random.choice(modules), **more))
        outer = i if "kind" in more else outer
    order = list(reversed(range(len(make.document["ops"]))))
    place = {op: at for at, op in enumerate(order)}
    steps = []
    for op in order:
        goals = [make.producer(v) for _, v in make.document["ops"][op]["inputs"]]
        targets = [place[g] if g is not None and random.random() < 0.8 else None for g in goals]
        out = [gradient(None, (2, 2), 0.0)] * len(goals)
        steps.append(step(op, "Node", [gradient(None, (2, 2), 1.0)], out, targets))
    make.document["backwards"] = [{"source": source(1), "roots": values[-1:], "steps": steps}]
    return make.document
