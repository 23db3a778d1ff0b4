"""An experiment's specification: the request body, the stored JSON and the trainer's argument are one model.

Every bound on a field stands on the field; `resolve` adds what only holds between fields.
"""

import unicodedata
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from service.errors import BadRequestValue, BudgetExceeded
from service.lowrank import compression
from service.lowrank.allocation import Weighting

PARAMETER_LIMIT = 5 * 10**7
WORK_LIMIT = 10**16
RECORDED_LIMIT = 2 * 10**7
DATA_LIMIT = 10**8
WEIGHT_DTYPE = "float32"  # in which every network is trained and stored
TAG_KEY = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"  # without a colon, which splits `tag=key:value`

Status = Literal["queued", "running", "canceling", "succeeded", "failed", "canceled"]
DeliveryState = Literal["pending", "delivered", "failed"]
TERMINAL: frozenset[Status] = frozenset({"succeeded", "failed", "canceled"})
Target = Literal["tanh", "relu", "identity"]
Activation = Literal["tanh", "relu", "sigmoid", "identity"]
Optimizer = Literal["sgd", "adam", "adamw"]
Priority = Literal["low", "normal", "high"]
# Not unions: a refusal would name their members.
RuleOrAll = Literal[compression.RuleName, "all"]
RuleOrBudget = Literal[compression.RuleName, "global_budget"]
PresetName = Literal["memo", "memo-adamw", "small-init", "raw-relu", "no-decay"]
Ending = Literal["succeeded", "failed", "canceled"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Width = Annotated[int, Field(ge=1, le=4096)]


def _composed(value: object) -> object:
    """Text in NFC, before its length is taken: composing can make it longer."""
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


def _printable(text: str) -> str:
    """No control characters: labels travel into JSON, HTML and pictures, never into paths."""
    for character in text:
        if unicodedata.category(character) in {"Cc", "Cs"}:
            raise ValueError(f"control character U+{ord(character):04X} is not allowed")
    return text


LONGEST_LABEL = 200
Label = Annotated[
    str, BeforeValidator(_composed), StringConstraints(max_length=LONGEST_LABEL), AfterValidator(_printable)
]
Name = Annotated[Label, Field(min_length=1)]
TagKey = Annotated[str, StringConstraints(max_length=64, pattern=TAG_KEY)]
Tags = Annotated[dict[TagKey, Label], Field(max_length=20)]


class Strict(BaseModel):
    """No unknown fields, no coercion, no NaN or Infinity; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSpec(Strict):
    """Y = target(Z), Z = AX from make_regression, each target of Z divided by its standard deviation if asked."""

    n_samples: int = Field(1000, ge=2, le=10**6)
    n_features: int = Field(20, ge=1, le=4096)
    n_informative: int = Field(5, ge=1, le=4096)
    n_targets: int = Field(4, ge=1, le=4096)
    noise: float = Field(0.0, ge=0, le=1e6)
    target: Target = "tanh"
    standardize: bool = True
    validation_fraction: float = Field(0.2, ge=0, lt=1)
    seed: Seed | None = Field(None, description="null: the experiment's seed")


class NetworkSpec(Strict):
    """A fully connected network; layer l is z_l = activation(W_l z_{l-1} + b_l), the last one linear."""

    hidden: list[Width] = Field([64, 64], min_length=1, max_length=15)
    activation: Activation = "tanh"
    bias: bool = True
    init_scale: float = Field(1.0, ge=0, le=1000, description="factor on PyTorch's default initialisation")


class TrainingSpec(Strict):
    """Mean squared error by one of PyTorch's optimizers at its default settings."""

    optimizer: Optimizer = "sgd"
    lr: float = Field(0.2, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="for sgd only")
    weight_decay: float = Field(0.005, ge=0)
    batch_size: int = Field(16, ge=1, le=10**6)
    epochs: int = Field(60, ge=1, le=100_000)


class RecordSpec(Strict):
    """Which epochs (0, every `every`-th and the last) and which layers' spectra are kept."""

    every: int = Field(1, ge=1, le=100_000)
    layers: Literal["all"] | list[Annotated[str, StringConstraints(max_length=3)]] = "all"


class WebhookSpec(Strict):
    """Where to tell of the experiment's end, and of which ends."""

    url: Annotated[str, StringConstraints(min_length=1, max_length=2000), AfterValidator(_printable)] = Field(
        description="http or https, to a public address, without a password", json_schema_extra={"format": "uri"}
    )
    events: list[Ending] = Field(["succeeded", "failed", "canceled"], min_length=1, max_length=3)

    @field_validator("events")
    @classmethod
    def _each_once(cls, events: list[Ending]) -> list[Ending]:
        if len(set(events)) < len(events):
            raise ValueError("each end is named once")
        return events


class ExperimentSpec(Strict):
    """What to train. Every field is optional; a preset is a base that the other fields override."""

    preset: PresetName = "memo"
    name: Name | None = None
    tags: Tags = {}
    seed: Seed = 0
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,2})$")] = "auto"
    priority: Priority = "normal"
    webhook: WebhookSpec | None = Field(None, description="gets a signed message when the experiment ends")
    data: DataSpec = DataSpec()
    network: NetworkSpec = NetworkSpec()
    training: TrainingSpec = TrainingSpec()
    record: RecordSpec = RecordSpec()

    @property
    def widths(self) -> list[int]:
        """Sizes of input, hidden layers and output."""
        return [self.data.n_features, *self.network.hidden, self.data.n_targets]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name (W1, W2, …) → shape (outputs, inputs) of its weight, as PyTorch stores it."""
        widths = self.widths
        return {f"W{i + 1}": (widths[i + 1], widths[i]) for i in range(len(widths) - 1)}

    @property
    def recorded_layers(self) -> list[str]:
        """Names of the layers whose spectra are kept, in the network's order."""
        layers = self.record.layers
        return [name for name in self.shapes if layers == "all" or name in layers]

    @property
    def recorded_epochs(self) -> list[int]:
        """0, every `every`-th and always the last epoch."""
        last = self.training.epochs
        return [*range(0, last, self.record.every), last]

    @property
    def n_validation(self) -> int:
        """Samples held out: the last ones."""
        return round(self.data.n_samples * self.data.validation_fraction)

    @property
    def n_recorded(self) -> int:
        """How many epochs are recorded, without a list of them."""
        return -(-self.training.epochs // self.record.every) + 1

    @property
    def n_training(self) -> int:
        """Samples trained on: the first ones."""
        return self.data.n_samples - self.n_validation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; a last short batch is kept."""
        return -(-self.n_training // self.training.batch_size)

    @property
    def parameters(self) -> int:
        """Weights and biases of the network."""
        return sum(m * n + m * self.network.bias for m, n in self.shapes.values())

    @property
    def work(self) -> int:
        """About the floating-point operations of training: 6·parameters·samples·epochs."""
        return 6 * self.parameters * self.data.n_samples * self.training.epochs

    @property
    def recorded_values(self) -> int:
        """Singular values that are kept, of W and of W − W₀."""
        return 2 * sum(min(self.shapes[name]) for name in self.recorded_layers) * self.n_recorded


PRESETS: dict[str, dict[str, Any]] = {
    "memo": {},
    "memo-adamw": {"training": {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 1.0, "batch_size": 32, "epochs": 60}},
    "small-init": {
        "network": {"init_scale": 0.1},
        "training": {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "batch_size": 32, "epochs": 60},
    },
    "raw-relu": {
        "data": {"n_samples": 2000, "n_features": 10, "target": "relu", "standardize": False},
        "network": {"hidden": [100, 100], "activation": "relu"},
        "training": {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "batch_size": 128, "epochs": 150},
    },
    "no-decay": {"training": {"weight_decay": 0.0}},
}

PRESET_NOTES: dict[str, str] = {
    "memo": "The memo's toy experiment: SGD with weight decay; the spectrum of W2 falls.",
    "memo-adamw": "The same with AdamW's decoupled weight decay.",
    "small-init": "No decay, all parameters ×0.1 at the start: low rank by growth from a small initialisation.",
    "raw-relu": "ReLU on unscaled targets: the rank falls because the top grows; the median σ does not fall.",
    "no-decay": "The honest negative: the memo without weight decay fits as well and keeps its full rank.",
}


def resolve(body: dict[str, Any]) -> ExperimentSpec:
    """The full specification for a request body: preset, then the body's fields, then the rules between fields.

    Raises pydantic.ValidationError, BadRequestValue or BudgetExceeded.
    """
    preset = body.get("preset", "memo")
    base = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    spec = ExperimentSpec.model_validate(_merge(base, body))
    if spec.data.seed is None:
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"seed": spec.seed})})
    _check_fields_together(spec)
    _check_budget(spec)
    return spec


def _merge(base: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _merge(value, body[key])
        for key, value in base.items()
        if isinstance(value, dict) and isinstance(body.get(key), dict)
    }
    return {**base, **body, **nested}


def _check_fields_together(spec: ExperimentSpec) -> None:
    data, training, layers = spec.data, spec.training, spec.record.layers
    if data.n_informative > data.n_features:
        message = f"cannot be more than n_features, which is {data.n_features}"
        raise BadRequestValue("/data/n_informative", data.n_informative, message)
    if spec.n_training < 1:
        message = f"leaves none of the {data.n_samples} samples to train on"
        raise BadRequestValue("/data/validation_fraction", data.validation_fraction, message)
    if training.batch_size > data.n_samples:
        message = f"cannot be more than data.n_samples, which is {data.n_samples}"
        raise BadRequestValue("/training/batch_size", training.batch_size, message)
    if training.momentum and training.optimizer != "sgd":
        message = f"applies to sgd only; {training.optimizer} takes 0"
        raise BadRequestValue("/training/momentum", training.momentum, message)
    if layers != "all" and (not layers or len(set(layers)) < len(layers) or not set(layers) <= set(spec.shapes)):
        message = f'must be "all" or distinct names out of {", ".join(spec.shapes)}'
        raise BadRequestValue("/record/layers", layers, message)


class _Budget(NamedTuple):
    what: str
    figure: int
    limit: int
    advice: str


def _check_budget(spec: ExperimentSpec) -> None:
    """The joint limits on memory, time and storage; each figure is what the worker would really spend."""
    data, parameters = spec.data, spec.parameters
    ranks = sum(min(shape) for shape in spec.shapes.values())
    cut_work = 2 * parameters * spec.n_validation * ranks
    batch = 3 * min(spec.training.batch_size, spec.n_training) * sum(spec.widths[1:])
    values = data.n_samples * (data.n_features + data.n_targets)
    smaller = "take fewer or narrower layers"
    shorter = f"{smaller}, fewer samples or fewer epochs"
    for budget in (
        _Budget("parameters", parameters, PARAMETER_LIMIT, smaller),
        _Budget("work (6·parameters·samples·epochs)", spec.work, WORK_LIMIT, shorter),
        _Budget("work of the cuts (2·parameters·validation samples·ranks)", cut_work, WORK_LIMIT, shorter),
        _Budget(
            "recorded values", spec.recorded_values, RECORDED_LIMIT, "raise record.every or name fewer record.layers"
        ),
        _Budget("batch values (3·batch·outputs of all layers)", batch, DATA_LIMIT, "take a smaller batch"),
        _Budget("data values (samples·(features + targets))", values, DATA_LIMIT, "take fewer samples or features"),
    ):
        if budget.figure > budget.limit:
            raise BudgetExceeded(*budget)


class RuleParameters(BaseModel):
    """The parameters of all rules; each rule takes one at most."""

    model_config = ConfigDict(extra="forbid")

    rank: int | None = Field(None, ge=1, le=65_536, description="for rule=rank")
    threshold: float | None = Field(None, ge=0, le=1, description="for rule=energy (0.99) and error (0.1)")
    fraction: float | None = Field(None, gt=0, le=1, description="for the budgets (0.5): of the parameters kept")


FactorsFormat = Literal["safetensors", "npz", "peft"]
FactorDtype = Literal["float64", "float32", "float16", "bfloat16"]
Split = Literal["balanced", "left"]


class FactorsSpec(RuleParameters):
    """Which rank each layer of an analysis is factored at, and how the factors are stored."""

    model_config = Strict.model_config

    rule: RuleOrBudget = "energy"
    weighting: Weighting = "relative"
    layers: list[Annotated[str, StringConstraints(max_length=1000)]] | None = Field(
        None, max_length=100_000, description="names of those to factor; the others stay dense. null: all"
    )
    format: FactorsFormat = "safetensors"
    dtype: FactorDtype | None = Field(
        None, description="null: float64 for what is stored in it or in integers, else float32"
    )
    split: Split = Field("balanced", description="B = U√Σ, A = √ΣVᵀ; or B = UΣ, A = Vᵀ")
    name: Name | None = None
    priority: Priority = "normal"

    @field_validator("dtype")
    @classmethod
    def _named_by_the_format(cls, dtype: FactorDtype | None, info: ValidationInfo) -> FactorDtype | None:
        if dtype == "bfloat16" and info.data.get("format") == "npz":
            raise ValueError(".npz has no name for bfloat16; take safetensors, or another dtype")
        return dtype
