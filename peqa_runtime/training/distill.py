"""A teacher: another model's (or the base's own) logits that a tuned model is drawn to, as a part of the loss."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from peqa_runtime.errors import InvalidCheckpoint, InvalidData
from peqa_runtime.text import load_tokenizer
from peqa_runtime.training.tuning import TunableModel, as_base, fast_compute_dtype, logits_at

_WEIGHTS = ("*.safetensors", "*.bin")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class Teacher:
    """Gives logits at the loss's places. Without a model of its own it is the base that is being tuned, unscaled."""

    def __init__(self, tunable: TunableModel, model: PreTrainedModel | None = None) -> None:
        self._tunable, self._model = tunable, model

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """[loss tokens, vocab], fp32, without a gradient."""
        given = (batch["input_ids"], batch["positions"], batch.get("position_ids"))
        with torch.no_grad():
            if self._model is not None:
                return logits_at(self._model, *given)
            with as_base(self._tunable, batch["input_ids"].numel()):
                return logits_at(self._tunable.model, *given)


def load_teacher(folder: Path | None, tunable: TunableModel) -> Teacher:
    """A Hugging Face folder (a float model, or any base) as teacher; None is the tuned base itself.

    Raises `InvalidCheckpoint` for a folder that cannot be loaded, `InvalidData` where its tokens are others.
    """
    if folder is None:
        return Teacher(tunable)
    device = tunable.model.device
    _check_folder(folder)
    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=fast_compute_dtype(device), local_files_only=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidCheckpoint(f"the teacher {folder} cannot be loaded: {reason}") from error
    if tokenizer.get_vocab() != tunable.tokenizer.get_vocab():
        raise InvalidData(f"the teacher {folder} has other tokens than the base: it cannot be learned from")
    model.requires_grad_(False)
    return Teacher(tunable, model.to(device).eval())


def teacher_digest(folder: Path) -> str:
    """What tells a teacher from one that took its place: a digest of config.json (which names a base's own digest) and,
    of each file of weights, of its name, its size and a few MB spread over it.

    A model that was trained further has other weights throughout, and a whole float model would take a minute to read.
    """
    _check_folder(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InvalidCheckpoint(f"the teacher {folder} is no model folder: it has no config.json")


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || model) of each row at `temperature`, times its square: [rows], from [rows, vocab] each.

    The square keeps the gradient's size when the temperature changes (Hinton et al., arXiv 1503.02531). Vocabularies
    that are padded to unlike sizes are cut to the smaller.
    """
    vocab = min(logits.shape[-1], teacher.shape[-1])
    ours = functional.log_softmax(logits[:, :vocab] / temperature, -1)
    theirs = functional.log_softmax(teacher[:, :vocab] / temperature, -1)
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1) * temperature**2
