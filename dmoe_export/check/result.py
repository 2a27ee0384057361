"""What a check found, in numbers: the typed report behind the table, the JSON and the HTML file.

Errors are of a backend against the eager float32 reference. A row is one token; "worst" is over rows.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..description import Frozen, Precision

REPORT_VERSION = 1


class TensorError(Frozen):
    """How far a tensor lies from the reference; cosine and norm ratio are per row (last axis, or heads × D)."""

    cosine_worst: float = Field(description="least cosine similarity of a row, 1 = same direction")
    cosine_mean: float
    norm_ratio_low: float = Field(description="least ratio |backend row| / |reference row|")
    norm_ratio_high: float
    max_abs: float = Field(description="largest absolute difference of an element")
    rows: int = Field(description="rows compared")
    norm_ratio_mean: float | None = None
    not_finite: int = Field(0, description="rows with NaN or infinity on either side, among `rows`; their cosine "
                            "counts as −1, their ratio and difference as 1e30")


class RouterAgreement(Frozen):
    """Whether a layer's router chose the same experts. A token agrees if its set of experts is the same."""

    tokens: int
    agreeing: int
    largest_gap: float = Field(description="where sets differ: largest difference between the reference's scores of an "
                               "expert it took and of one the backend took instead; small = a near tie. Tokens whose "
                               "block changed its coreset are left out: their choice was not theirs")
    unique_reference: int = Field(description="experts that occur at all")
    unique_backend: int
    with_block: int = Field(0, description="of the tokens that differ, those whose whole block took another coreset")
    unexplained: int | None = Field(None, description="tokens whose experts are not what the routing rule gives for "
                                    "the backend's own router logits; null where the backend does not show them")

    @property
    def share(self) -> float:
        """Agreeing tokens / tokens."""
        return self.agreeing / self.tokens if self.tokens else 1.0


class LayerCheck(Frozen):
    """One layer. `update` = what the layer adds to the residual stream; None where the backend does not show it."""

    layer: int
    kind: Literal["dense", "moe"]
    update: TensorError | None = Field(description="over tokens whose experts agree")
    key: TensorError
    value: TensorError
    router: RouterAgreement | None = Field(description="null for dense layers")
    passed: bool
    reason: str | None = Field(description="the gate that failed, in a few words; null when passed")
    attention: TensorError | None = Field(None, description="what attention adds to the stream")
    feed_forward: TensorError | None = Field(None, description="what the feed-forward adds, over tokens whose experts "
                                             "agree")
    router_logits: TensorError | None = None


class Gate(Frozen):
    """One number held against one limit."""

    name: str
    where: str = Field(description="such as 'layer 3 alone, update' or 'logits'")
    value: float
    limit: float
    comparison: Literal["at least", "at most", "equal"]
    passed: bool


class GenerationCheck(Frozen):
    """The same prompt decoded by reference and backend (greedy)."""

    prompt: str | None
    prompt_tokens: int
    reference_ids: list[int]
    backend_ids: list[int]
    reference_text: str | None
    backend_text: str | None
    first_difference: int | None = Field(description="index of the first token that differs; null = all equal")
    reference_forwards: int
    backend_forwards: int
    reference_unique_experts: list[float] = Field(description="mean over MoE layers, per denoise step; [] if dense")
    backend_unique_experts: list[float]
    near_tie: bool | None = Field(None, description="whether the step where the two part was a near tie; null = all "
                                  "tokens equal")


class ConfidencePoint(Frozen):
    """Confidence of one position of the forward: probability of the reference's and of the backend's best token."""

    reference: float
    backend: float
    same_token: bool


class BackendCheck(Frozen):
    """One backend against the reference."""

    name: str
    what_ran: str = Field(description="file and library, such as 'denoiser.onnx on ONNX Runtime 1.31 CPU'")
    layers_alone: list[LayerCheck] = Field(description="each layer fed with the reference's input, so errors do not "
                                           "add up; empty where the backend cannot")
    layers_in_sequence: list[LayerCheck] = Field(description="the graph as it is; errors add up from layer to layer")
    logits: TensorError
    same_best_token: float | None = Field(description="share of positions with the reference's best token; null = not "
                                          "known, as numbers are not finite")
    confidence: list[ConfidencePoint] = Field(description="of the positions where both sides are finite")
    generations: list[GenerationCheck] = Field(description="empty in few-layer mode")
    gates: list[Gate]
    first_bad_layer: int | None
    passed: bool
    seconds: float
    embedding_alone: TensorError | None = None
    logits_alone: TensorError | None = Field(None, description="the head fed with the reference's last stream")
    first_bad_part: str | None = Field(None, description="what failed first, such as 'layer 3 alone, attention'; null "
                                       "when passed")


class IdentityCheck(Frozen):
    """Is the reference the checkpoint that the bundle was made from?"""

    same: bool | None = Field(description="null = not compared; see note")
    bundle: str
    reference: str | None
    note: str


class WeightsCheck(Frozen):
    """The bundle's bytes against the checkpoint's, converted as the exporter converts."""

    compared: bool
    note: str
    tensors: int
    experts: int = Field(description="expert slabs among them")
    bytes: int
    different: list[str] = Field(description="those that differ, at most 20, such as 'layer 1 expert 5 gate_up'")
    first_bad_layer: int | None
    passed: bool


class EngineFinding(Frozen):
    """One thing an engine file was asked."""

    name: str
    passed: bool | None = Field(description="null = cannot be known on this machine; see detail")
    detail: str


class EngineCheck(Frozen):
    """An engine file, inspected without a GPU."""

    file: str
    flavour: str
    version: str
    targets: list[str]
    findings: list[EngineFinding]
    passed: bool


class QuantisationCheck(Frozen):
    """What rounding the weights itself does: the float32 reference with the checkpoint's own weights against the one
    with the stored values. No gate: the backends are held against the latter."""

    weights: str = Field(description="how they are stored")
    group_size: int | None = Field(description="weights that share a scale; null = none are integers")
    logits: TensorError
    divergence: float | None = Field(description="Kullback-Leibler divergence of the next-token distributions, mean, "
                                     "in nats; null = not known, as numbers are not finite")
    same_best_token: float | None = Field(description="share of positions with the same best token; null likewise")
    same_experts: float | None = Field(description="share of tokens and MoE layers with the same experts; null = a "
                                       "dense model")


class InputsUsed(Frozen):
    """What was fed."""

    source: Literal["prompts", "random tokens"]
    rows: int
    tokens: int = Field(description="of all rows, padding not counted")
    masked: int = Field(description="masked positions among them")
    seed: int


class CheckReport(Frozen):
    """The whole report; `passed` is the exit code."""

    report_version: Literal[1] = 1
    bundle: str
    reference: str
    reference_kind: Literal["checkpoint", "bundle weights"]
    family: str
    precision: Precision = Field(description="compute type")
    stored: str = Field(description="compute type and how weights are stored, in words")
    routing: str
    block_length: int
    layers_checked: int
    layers_total: int
    experts_exercised: dict[int, int] = Field(description="MoE layer → experts that at least one token used")
    num_experts: int
    inputs: InputsUsed
    identity: IdentityCheck
    weights: WeightsCheck
    backends: list[BackendCheck]
    engines: list[EngineCheck]
    first_bad_layer: int | None
    passed: bool
    verdict: str = Field(description="one sentence")
    created: str = Field(description="ISO 8601, UTC")
    machine: str
    versions: dict[str, str]
    seconds: float
    reference_not_finite: str | None = Field(None, description="the part of the reference that first computes NaN or "
                                             "infinity; null = none")
    quantisation: QuantisationCheck | None = Field(None, description="null where no weights are rounded or no "
                                                   "checkpoint was given")
