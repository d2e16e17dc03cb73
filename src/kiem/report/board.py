"""TensorBoard event files of a run, on request (`train.tensorboard`, needs kiem[tensorboard])."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kiem.errors import ConfigError
from kiem.format import printable

# kind of metrics record -> key -> tag in TensorBoard.
TAGS: dict[str, dict[str, str]] = {
    "step": {
        "loss": "train/loss",
        "grad_norm": "train/grad_norm",
        "lr": "train/lr",
        "matrix_lr": "train/matrix_lr",
        "tokens_per_second": "speed/tokens_per_second",
        "matmul_share": "speed/matmul_share",
        "memory_bytes": "speed/memory_bytes",
    },
    "eval": {"loss": "eval/loss", "perplexity": "eval/perplexity", "bits_per_byte": "eval/bits_per_byte"},
}


class Board:
    """Writes the records of metrics.jsonl and samples.jsonl as TensorBoard events under `run_folder/tensorboard`.

    `first_step`: updates done before this start; what an earlier, interrupted start wrote after them is hidden.
    Raises ConfigError if tensorboard is not installed.
    """

    def __init__(self, run_folder: str | Path, first_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "train.tensorboard is on, and tensorboard is not installed: pip install 'kiem[tensorboard]', "
                "or set train.tensorboard=false"
            ) from error
        folder = str(Path(run_folder) / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=first_step + 1 if first_step else None)

    def record(self, record: Mapping[str, Any]) -> None:
        """Take in one metrics record; kinds and keys without a tag are left out."""
        for key, tag in TAGS.get(record.get("kind", ""), {}).items():
            value = record.get(key)
            if isinstance(value, int | float):  # NaN included: TensorBoard marks it
                self._writer.add_scalar(tag, value, record["step"])

    def sample(self, sample: Mapping[str, Any]) -> None:
        """Take in one sample, indented: TensorBoard reads Markdown, and an indented block has no end to forge."""
        text = printable(f"{sample['prompt']}{sample['text']}").expandtabs(4)
        self._writer.add_text("samples", "\n".join("    " + line for line in text.split("\n")), sample["step"])

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
