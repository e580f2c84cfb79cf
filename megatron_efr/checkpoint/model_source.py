"""The source of a model: a Hugging Face folder, or a Megatron checkpoint and the Hugging Face
folder it began with.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_efr.checkpoint.manifest import LATEST, MANIFEST, STATE, read_state, verify
from megatron_efr.checkpoint.torch_dist import CheckpointWeights, is_checkpoint
from megatron_efr.config import ModelConfig
from megatron_efr.errors import UserError
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import TensorSource, fingerprint, initial_weights

# within a converted checkpoint: the folder it came from, without its weights
HUGGING_FACE = "hugging_face"
_GIVE_TEMPLATE = (
    "name a folder with its config.json and tokenizer: template=FOLDER (efr convert: --template "
    "FOLDER)"
)


@dataclass(frozen=True)
class ModelSource:
    """A model: `start`, whose path is a Hugging Face folder, with the folder's weights or those of
    `checkpoint`.
    """

    start: ModelConfig
    seed: int
    checkpoint: Path | None

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture of `start`, read when it is first asked for; ConfigError as there."""
        return Architecture.from_folder(self.start.path)

    def weights(self) -> TensorSource:
        """The weights, read (or drawn from the seed, if `start` says so) tensor by tensor.

        A checkpoint is verified first; UserError names what is missing or damaged.
        """
        if self.checkpoint is None:
            return initial_weights(self.start, self.architecture, self.seed)
        verify(self.checkpoint)
        return CheckpointWeights(self.checkpoint, self.architecture)

    def fingerprint(self) -> str:
        """SHA-256 over config.json and the weights; of a checkpoint, over the checksums in its
        manifest.
        """
        if self.checkpoint is None:
            return fingerprint(self.start.path, self.seed if self.start.init == "random" else None)
        digest = hashlib.sha256((Path(self.start.path) / "config.json").read_bytes())
        digest.update((self.checkpoint / MANIFEST).read_bytes())
        return digest.hexdigest()


def find_model(model: ModelConfig, seed: int, template: str | None = None) -> ModelSource:
    """The model at `model.path`: a Hugging Face folder; a Megatron checkpoint, a run's or a
    converted one; or a run's folder (or its checkpoints/), whose newest checkpoint is taken.

    A checkpoint's configuration and tokenizer come from `template`, by default from the model that
    it was made from.
    """
    checkpoint = find_checkpoint(Path(model.path))
    if checkpoint is None:
        return ModelSource(model, seed, None)
    folder = template or str(find_template(checkpoint))
    return ModelSource(model.model_copy(update={"path": folder}), seed, checkpoint)


def find_template(checkpoint: Path) -> Path:
    """The Hugging Face folder that a checkpoint was made from; UserError if it is not to be
    found.
    """
    if (checkpoint / HUGGING_FACE).is_dir():
        return checkpoint / HUGGING_FACE
    if not (checkpoint / STATE).is_file():
        raise UserError(
            f"{checkpoint}: no {STATE} and no {HUGGING_FACE}/, one of which says what model it is "
            f"of; {_GIVE_TEMPLATE}"
        )
    path = Path(read_state(checkpoint)["initial_model"]["path"])
    if not (path / "config.json").is_file():
        raise UserError(
            f"{checkpoint}: was trained from {path}, which is not there; {_GIVE_TEMPLATE}"
        )
    return path


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint at `path`, or the newest of the run there; None if it is neither.

    UserError if it is a run's that has none to take: it says which of those that lie there verify.
    """
    if is_checkpoint(path):
        return path
    for folder in (path, path / "checkpoints"):
        if (latest := folder / LATEST).is_file():
            name = latest.read_text(encoding="utf-8", errors="replace").strip().replace("\0", "?")
            if name and is_checkpoint(folder / name):
                return folder / name
            raise UserError(
                f"{latest}: names {name!r}, which is no checkpoint there; {_those_of(folder)}"
            )
    is_model = (path / "config.json").is_file()
    is_run = (path / "config.yaml").is_file()
    if is_model or not (is_run or _saved(path) or _saved(path / "checkpoints")):
        return None
    if (path / "model/config.json").is_file():
        raise UserError(
            f"{path}: a run's folder, and none of its checkpoints is left; its model is "
            f"{path / 'model'}"
        )
    checkpoints = path if _saved(path) else path / "checkpoints"
    raise UserError(
        f"{path}: a run that has no checkpoint yet, and so no model; {_those_of(checkpoints)}"
    )


def _saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, finished or not, the newest first."""
    return sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)


def _those_of(folder: Path) -> str:
    """Checkpoint of a run that verifies, or what is wrong with each."""
    faults: list[str] = []
    for path in _saved(folder):
        try:
            verify(path)
        except UserError as error:
            faults.append(f"\n  {error}")
        else:
            return f"the newest that verifies is {path}: name that one"
    return (
        f"{folder} holds none that verifies{''.join(faults)}\nit gets one every checkpoint.every "
        "steps"
    )
