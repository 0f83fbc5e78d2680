"""The code of an exported MLflow model ("models from code"): MLflow runs this file to load one."""

from __future__ import annotations

import warnings
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel

from pipeline.runs.predictor import Adapter

# MLflow would make a schema of type hints; the model's signature says more than they could.
warnings.filterwarnings("ignore", ".*Add type hints to the `predict` method")


class AdaptingModel(PythonModel):  # type: ignore[misc]  # MLflow is untyped
    """`predict` takes a support set and queries, and adapts before it answers."""

    def load_context(self, context: Any) -> None:
        """Read the parameters and the recipe; no pickle."""
        self._adapter = Adapter.load(context.artifacts["adapter"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """{support_x, support_y, query_x} -> {predictions, scores, support_loss}."""
        steps = int((params or {}).get("steps", -1))
        try:
            return self._adapter.predict(
                model_input["support_x"],
                model_input["support_y"],
                model_input["query_x"],
                steps=None if steps < 0 else steps,
            )._asdict()
        except ValueError as error:
            # Of other errors, MLflow's server says no more than that there was one.
            raise MlflowException.invalid_parameter_value(str(error)) from error


mlflow.models.set_model(AdaptingModel())
