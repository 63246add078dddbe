"""A saved model as an MLflow model: image bytes in, both embeddings out, for whoever knows only MLflow.

    mlflow.pyfunc.load_model("models:/namr@champion").predict(pandas.DataFrame({"image": [data]}))

The package holds the saved model's two files as they are, and names this module as its loader; so it needs
namr to be installed where it is loaded, and nothing in it is pickled.

Not covered: batches of a size of one's own (extraction's job).
"""

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from namr.data import images
from namr.errors import ImageRefused, ShapeError
from namr.model import model

DATA_PATH = "data/namr"
"""Where the saved model lies in a package."""

_BATCH_SIZE = 32
_REQUIREMENTS = ("namr", "mlflow", "torch", "torchvision", "timm")


def write(folder: Path, package: Path) -> None:
    """Make the MLflow model `package` of what `model.save` wrote to `folder`."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    vector = Array(DataType.float)
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(vector, "embedding"), ColSpec(vector, "structure")]),
    )
    staged = package.parent / Path(DATA_PATH).name  # MLflow keeps the folder's own name
    staged.mkdir()
    for name in (model.WEIGHTS_FILE, model.DESCRIPTION_FILE):
        shutil.copyfile(folder / name, staged / name)
    versions = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]
    mlflow.pyfunc.save_model(
        str(package),
        loader_module=__name__,
        data_path=str(staged),
        signature=signature,
        pip_requirements=versions,  # else MLflow would load the model to find out
    )


class Embedder:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, folder: Path) -> None:
        self._model = model.load(folder)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        """DataFrame with "image" (bytes) -> DataFrame with "embedding" and "structure" (D floats each).

        ImageRefused names the first row that is no image.
        """
        if "image" not in getattr(model_input, "columns", ()):
            kind = type(model_input).__name__
            raise ShapeError(f"the input is a {kind}; expected a DataFrame with a column image of bytes")
        side = self._model.preprocessing.size_px
        pixels = np.empty((len(model_input), 3, side, side), np.uint8)
        for row, data in enumerate(model_input["image"]):
            try:
                pixels[row] = images.prepare(data, self._model.preprocessing)
            except ImageRefused as error:
                raise ImageRefused(f"row {row}: {error.reason}") from error
        embeddings, structures = model.embed(self._model, pixels, batch_size=_BATCH_SIZE, device=self._device)
        data_frame = type(model_input)  # pandas came with the caller
        return data_frame({"embedding": embeddings.tolist(), "structure": structures.tolist()})


def _load_pyfunc(path: str) -> Embedder:
    """The name that MLflow looks for in a loader module."""
    return Embedder(Path(path))
