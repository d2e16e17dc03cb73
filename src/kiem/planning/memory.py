"""Memory of a training step by arithmetic, by kind and at its peak. No torch.

Follows what model/, optim/ and training/step.py allocate on a CPU; tests hold it against what
autograd saves and what a step takes. On CUDA the kinds are the same, and fused kernels differ in small terms.

Letters: B rows, T time, N = B*T, D embedding, H query heads, G key and value heads, K head size, F hidden,
V vocabulary; e: bytes of a number in the compute type.
"""

from dataclasses import asdict, dataclass
from math import prod

from kiem.config.model import ModelConfig
from kiem.config.run import TrainConfig
from kiem.planning.count import Shape, parameter_shapes

FLOAT32 = 4
BATCH_BYTES_PER_TOKEN = 28  # tokens, targets, positions in int64, document numbers in int32
LOSS_CHUNK_ELEMENTS = 1 << 24  # logits in one chunk, as in ops/cross_entropy.py (a test holds them equal)


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step by kind. `peak` is less than their sum: not all of them live at one time."""

    weights: int
    gradients: int
    optimizer: int  # moments, kept between steps
    activations: int  # kept from forward to backward, for one micro-batch
    loss: int  # the chunk of logits and the gradients made with it
    update: int  # what the optimizer takes for a moment
    batch: int  # the step's tokens and targets
    peak: int

    def to_dict(self) -> dict[str, int]:
        return {f"{kind}_bytes": value for kind, value in asdict(self).items()}


@dataclass(frozen=True)
class Rows:
    """One micro-batch: B rows of T tokens in a compute type of e bytes; packed: attention takes a document mask."""

    B: int
    T: int
    e: int
    packed: bool

    @property
    def N(self) -> int:
        return self.B * self.T


def micro_batch(model: ModelConfig, train: TrainConfig, compute_bytes: int, packed: bool) -> Rows:
    """The micro-batch of a resolved config: rows are as long as the context."""
    T = model.context_length
    return Rows(max(1, train.micro_batch_tokens // T), T, compute_bytes, packed)


def memory(model: ModelConfig, train: TrainConfig, compute_bytes: int, packed: bool = True) -> Memory:
    """Memory of a step of a resolved `train` by kind. compute_bytes: 4 for float32, 2 for bfloat16.

    packed: rows hold several documents that do not see each other, the usual case of real text.
    """
    rows, shapes = micro_batch(model, train, compute_bytes, packed), parameter_shapes(model)
    weights = FLOAT32 * sum(map(prod, shapes.values()))
    table = FLOAT32 * model.vocab_size * model.emb_dim
    optimizer, update = _optimizer_bytes(shapes, train), _update_bytes(shapes, train)
    batch = BATCH_BYTES_PER_TOKEN * train.batch_tokens
    block = block_activations(model, rows)
    if train.activation_checkpointing:
        residual = rows.N * model.emb_dim * rows.e  # the input of each block; the rest is made again, one at a time
        activations, again = outer_activations(model, rows) + model.n_layers * residual, block - residual
    else:
        activations, again = outer_activations(model, rows) + model.n_layers * block, 0
    loss = loss_bytes(model, rows)
    # With more than one micro-batch the gradients of those before are there while the next goes forward.
    before = weights if train.batch_tokens > train.micro_batch_tokens else 0
    tables = table * (2 if before and model.tie_embeddings else 1)
    peak = (
        weights
        + optimizer
        + batch
        + max(
            before + activations + loss,  # the end of forward
            before + activations + again + table + _backward_bytes(model, rows),  # backward through the last block
            weights + outer_activations(model, rows) + tables,  # backward through the embeddings
            weights + update,
            weights + FLOAT32 * model.vocab_size * _chunk_rows(model, rows),  # an evaluation, the gradients still there
        )
    )
    return Memory(weights, weights, optimizer, activations, loss, update, batch, peak)


def block_activations(model: ModelConfig, rows: Rows) -> int:
    """Bytes that one block keeps for its backward."""
    D, F, N, e = model.emb_dim, model.hidden_dim, rows.N, rows.e
    total = 2 * _norm_activations(model.norm, N, D, e)  # before each branch
    total += 2 * N * D * e  # what the norms give to the matrices
    total += _attention_activations(model, rows)
    total += (2 if model.activation == "swiglu" else 1) * N * F * e  # what goes into the activation
    if model.drop_rate:
        total += 2 * N * D * e  # the masks on both branches
    if e != FLOAT32:  # the weights in the compute type
        total += e * sum(prod(s) for name, s in parameter_shapes(model).items() if name.startswith("blocks.0."))
    return total


def _norm_activations(kind: str, vectors: int, width: int, e: int) -> int:
    """LayerNorm keeps its input, mean and deviation; RMSNorm its input, deviation and result, all in float32."""
    if kind == "layernorm":
        return vectors * width * e + 2 * vectors * e
    return 2 * vectors * width * FLOAT32 + vectors * FLOAT32


def _attention_activations(model: ModelConfig, rows: Rows) -> int:
    """Queries, keys, values, output, and what lies between. Dropout on the weights needs them in full, B*H*T*T."""
    H, G, K, N, e = model.n_heads, model.n_kv_heads, model.head_dim, rows.N, rows.e
    total = _norm_activations("rmsnorm", N * (H + G), K, e) if model.qk_norm else 0
    if model.drop_rate:
        # Not fused, in float32: scaled queries, keys, values; weights, their mask, their product; and the output.
        return total + 3 * N * H * K * FLOAT32 + 3 * rows.B * H * rows.T**2 * FLOAT32 + N * H * K * e
    return total + N * (2 * H + 2 * G) * K * e + N * H * FLOAT32  # output, and the log of the softmax's denominator


def outer_activations(model: ModelConfig, rows: Rows) -> int:
    """Bytes kept for backward outside the blocks: embeddings, rotary tables, last norm."""
    N, D, e = rows.N, model.emb_dim, rows.e
    total = _norm_activations(model.norm, N, D, e)
    if model.position == "rope":
        total += N * model.head_dim * e
    if model.drop_rate:
        total += N * D * e
    return total + (N * rows.T * e if rows.packed and not model.drop_rate else 0)  # the document mask, one for all


def _chunk_rows(model: ModelConfig, rows: Rows) -> int:
    """Positions in one chunk of the loss."""
    return min(rows.N, max(1, LOSS_CHUNK_ELEMENTS // model.vocab_size))


def loss_bytes(model: ModelConfig, rows: Rows) -> int:
    """Most bytes that the chunked cross-entropy takes: features, their gradient, the head's, logits of a chunk."""
    V, D, N, e = model.vocab_size, model.emb_dim, rows.N, rows.e
    chunk = _chunk_rows(model, rows)
    total = 2 * N * D * e + FLOAT32 * V * D
    if e == FLOAT32:
        return total + FLOAT32 * V * chunk
    return total + e * V * D + V * (FLOAT32 + e) * (chunk + D)


def _backward_bytes(model: ModelConfig, rows: Rows) -> int:
    """What backward takes for a moment where it is widest, in the feed-forward: (N, F) made again, and gradients."""
    widest = model.hidden_dim * (3 if model.activation == "swiglu" else 2)
    return rows.N * (widest + 2 * model.emb_dim) * rows.e


def _is_muons(name: str, shape: Shape, train: TrainConfig) -> bool:
    return train.optimizer == "muon" and len(shape) == 2 and name.startswith("blocks.")


def _optimizer_bytes(shapes: dict[str, Shape], train: TrainConfig) -> int:
    """AdamW keeps two moments and a step count for each parameter, Muon one moment for each matrix; all in float32."""
    return sum(FLOAT32 * (prod(s) if _is_muons(name, s, train) else 2 * prod(s) + 1) for name, s in shapes.items())


def _update_bytes(shapes: dict[str, Shape], train: TrainConfig) -> int:
    """Most bytes an update takes: Muon handles all matrices of one shape together, AdamW works in place.

    Then there are: momentum looked ahead, its stack, two iterates, two products of the smaller side; and the update of
    the shape before.
    """
    groups: dict[Shape, int] = {}
    for name, shape in shapes.items():
        if _is_muons(name, shape, train):
            groups[shape] = groups.get(shape, 0) + 1
    most = before = 0
    for shape, count in groups.items():
        group = FLOAT32 * count * prod(shape)
        most = max(most, before + 4 * group + 2 * FLOAT32 * count * min(shape) ** 2)
        before = group
    return most
