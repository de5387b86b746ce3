"""FineTune spec.objective and spec.method: what is optimised, and how without training the whole model."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finetune_operator.api.common import Precision, Spec
from finetune_operator.api.rules import Rule, only_with

ModuleName = Annotated[str, Field(min_length=1, max_length=253)]


# Several names, or one regular expression: whatever is not a plain name must stand alone.
ONE_REGEX_OR_NAMES = Rule(
    "self.targetModules.size() == 1 || self.targetModules.all(name, name.matches('^[A-Za-z0-9_.]+$'))",
    "targetModules: give module names, or all-linear alone, or exactly one regular expression",
    field="targetModules",
)


class Objective(Spec):
    """What is optimised."""

    rules = (
        only_with("beta", "self.type in ['DPO', 'KTO', 'ORPO']", "beta: only DPO, KTO and ORPO have it; remove it"),
        only_with("desirableWeight", "self.type == 'KTO'", "desirableWeight: only KTO has it; remove it"),
        only_with("undesirableWeight", "self.type == 'KTO'", "undesirableWeight: only KTO has it; remove it"),
    )

    type: Literal["SFT", "DPO", "KTO", "ORPO", "Reward"] = Field(
        default="SFT",
        description="SFT (default): imitate the answers. DPO: prefer the chosen answers of Preference rows, measured "
        "against the base model. ORPO: prefer and imitate them, without the base model. KTO: prefer good answers to bad "
        "ones, from UnpairedPreference rows. Reward: a model that scores answers, from Preference rows; it is "
        "exported, and not served by an AdapterDeployment.",
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="DPO, KTO: how strongly the model is held to the base model. ORPO: weight of the preference term "
        "(lambda in the paper). Default: 0.1 for each of them.",
    )
    desirable_weight: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="KTO: weight of the good answers' losses. Default: 1. With n good and m bad answers, desirableWeight x "
        "n should be 1 to 4/3 times undesirableWeight x m.",
    )
    undesirable_weight: float | None = Field(
        default=None, gt=0, le=100, description="KTO: weight of the bad answers' losses. Default: 1."
    )


class Lora(Spec):
    """Low-rank adaptation: the base model stays frozen, two small matrices per target are trained."""

    rules = (
        ONE_REGEX_OR_NAMES,
        Rule(
            "!self.useDora || !(self.initialization in ['PiSSA', 'OLoRA', 'LoftQ'])",
            "useDora: DoRA needs an adapter that starts at zero; use initialization Default, Gaussian or EVA",
            field="useDora",
        ),
        Rule(
            "self.initialization != 'EVA' || !has(self.rankPattern) || self.rankPattern.size() == 0",
            "rankPattern: EVA shares the ranks out among the layers that get the same input; remove it, or use "
            "initialization Default",
            field="rankPattern",
        ),
        Rule(
            "!has(self.layersToTransform) || self.layersToTransform.size() == 0 || "
            "self.targetModules.all(name, name == 'all-linear' || name.matches('^[A-Za-z0-9_.]+$'))",
            "layersToTransform: a regular expression in targetModules names its layers itself; write them into it, or "
            "give names",
            field="layersToTransform",
        ),
    )

    rank: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="Rank r of the matrices. Default: 16. 8 for a start, 32 to 64 for complex tasks; size and memory "
        "grow with it.",
    )
    alpha: int = Field(
        default=32,
        ge=1,
        le=8192,
        description="The update is scaled by alpha / rank. Default: 32. Rule of thumb: twice the rank.",
    )
    dropout: float = Field(
        default=0.05, ge=0, le=0.9, description="Dropout before the matrices while training. Default: 0.05."
    )
    target_modules: list[ModuleName] = Field(
        default=["all-linear"],
        min_length=1,
        max_length=64,
        description="Layers to adapt. Default: [all-linear], every linear layer but the output head. Otherwise module "
        "names such as q_proj, or exactly one regular expression over full module names.",
    )
    exclude_modules: list[ModuleName] = Field(
        default_factory=list,
        max_length=64,
        description="Module names that are left out although they match targetModules. Default: none.",
    )
    modules_to_save: list[ModuleName] = Field(
        default_factory=list,
        max_length=16,
        description="Layers that are trained and stored whole, e.g. lm_head. Default: none. Such an adapter can only "
        "be served merged.",
    )
    bias: Literal["None", "All", "LoraOnly"] = Field(
        default="None",
        description="Which biases are trained: None (default), All, or LoraOnly (those of the target layers).",
    )
    use_rslora: bool = Field(
        default=False,
        description="Scale by alpha / sqrt(rank) (rsLoRA), which keeps high ranks stable. Default: false.",
    )
    use_dora: bool = Field(
        default=False,
        description="Train a magnitude per weight row too (DoRA): better at low ranks, slower. Default: false.",
    )
    initialization: Literal["Default", "Gaussian", "PiSSA", "OLoRA", "EVA", "LoftQ"] = Field(
        default="Default",
        description="How the matrices start. Default: Default (Kaiming, zero). PiSSA and OLoRA start from the base "
        "weights, EVA from the data, LoftQ from the quantization error.",
    )
    layers_to_transform: list[Annotated[int, Field(ge=0, le=1000)]] = Field(
        default_factory=list,
        max_length=256,
        description="Indices of the layers to adapt, counted from 0. Default: all layers.",
    )
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=1024)]], Field(max_length=64)] = Field(
        default_factory=dict,
        description="Other ranks for modules that match these names or regular expressions. Default: none.",
    )
    alpha_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=8192)]], Field(max_length=64)] = Field(
        default_factory=dict,
        description="Other alphas for modules that match these names or regular expressions. Default: none.",
    )
    lora_plus_ratio: float | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Learning rate of matrix B divided by that of matrix A (LoRA+), e.g. 16. Default: both equal.",
    )


class Quantization(Spec):
    """How the frozen base weights are stored while training."""

    type: Literal["NF4", "FP4", "INT8", "None"] = Field(
        default="NF4",
        description="NF4 (default of QLoRA) and FP4: 4 bit. INT8: 8 bit. None (default of the other methods): "
        "unquantized, in training.precision.",
    )
    double_quant: bool = Field(
        default=True,
        description="4 bit: quantize the quantization constants too, which saves 0.4 bit per weight. Default: true.",
    )
    compute_dtype: Precision = Field(
        default="Auto",
        description="4 bit: type that weights are expanded to for computing. Default: Auto, the same as "
        "training.precision.",
    )


class AdaLora(Spec):
    """LoRA with a budget of ranks that moves to the layers that need it."""

    rules = (
        ONE_REGEX_OR_NAMES,
        Rule(
            "self.targetRank <= self.initialRank",
            "targetRank: ranks are only ever cut; set it to at most initialRank",
            field="targetRank",
        ),
        Rule(
            "self.warmupRatio + self.finalRatio < 1.0",
            "finalRatio: warmupRatio and finalRatio leave no step to cut ranks in; their sum must be below 1",
            field="finalRatio",
        ),
    )

    initial_rank: int = Field(default=12, ge=1, le=1024, description="Rank of every target at the start. Default: 12.")
    target_rank: int = Field(default=8, ge=1, le=1024, description="Average rank at the end. Default: 8.")
    alpha: int = Field(default=32, ge=1, le=8192, description="Scale of the update. Default: 32.")
    dropout: float = Field(
        default=0.05, ge=0, le=0.9, description="Dropout before the matrices while training. Default: 0.05."
    )
    target_modules: list[ModuleName] = Field(
        default=["all-linear"],
        min_length=1,
        max_length=64,
        description="Layers to adapt, as in method.lora. Default: [all-linear].",
    )
    warmup_ratio: float = Field(
        default=0.1, ge=0, le=0.9, description="Share of the steps before ranks are first cut. Default: 0.1."
    )
    final_ratio: float = Field(
        default=0.2, ge=0, le=0.9, description="Share of the steps at the end with fixed ranks. Default: 0.2."
    )
    orthogonal_weight: float = Field(
        default=0.5, ge=0, le=10, description="Weight of the orthogonality penalty. Default: 0.5."
    )


class IA3(Spec):
    """One trained vector per target: the smallest adapter."""

    rules = (
        Rule(
            "!has(self.targetModules) || self.targetModules.size() < 2 || "
            "self.targetModules.all(name, name.matches('^[A-Za-z0-9_.]+$'))",
            "targetModules: give module names, or all-linear alone, or exactly one regular expression",
            field="targetModules",
        ),
        Rule(
            "!has(self.feedforwardModules) || self.feedforwardModules.all(name, has(self.targetModules) && "
            "(name in self.targetModules || (self.targetModules.size() == 1 && "
            "!self.targetModules[0].matches('^[A-Za-z0-9_.]+$'))))",
            "feedforwardModules: only targets can be scaled at their input; name these in targetModules too",
            field="feedforwardModules",
        ),
    )

    target_modules: list[ModuleName] = Field(
        default_factory=list,
        max_length=64,
        description="Layers whose output is scaled. Default: the architecture's own (k_proj, v_proj, down_proj for "
        "Llama).",
    )
    feedforward_modules: list[ModuleName] = Field(
        default_factory=list,
        max_length=64,
        description="Those targets whose input is scaled instead. Default: the architecture's own (down_proj for "
        "Llama).",
    )


class VirtualTokens(Spec):
    """Trained vectors in front of every prompt: PrefixTuning, PromptTuning and PTuning."""

    count: int = Field(
        default=20, ge=1, le=1024, description="Number of virtual tokens. Default: 20. They count towards the context."
    )
    init_text: str = Field(
        default="",
        max_length=4096,
        description="PromptTuning: text whose embeddings the vectors start from. Default: random vectors.",
    )
    projection: bool = Field(
        default=False,
        description="PrefixTuning: train through a two-layer projection, which is more stable. Default: false.",
    )


class Method(Spec):
    """How the model is adapted without training all of it."""

    rules = (
        only_with(
            "lora", "self.type in ['QLoRA', 'LoRA']", "lora: only QLoRA and LoRA have it; remove it or change type"
        ),
        only_with("adaLora", "self.type == 'AdaLoRA'", "adaLora: only AdaLoRA has it; remove it or change type"),
        only_with("ia3", "self.type == 'IA3'", "ia3: only IA3 has it; remove it or change type"),
        only_with(
            "virtualTokens",
            "self.type in ['PrefixTuning', 'PromptTuning', 'PTuning']",
            "virtualTokens: only PrefixTuning, PromptTuning and PTuning have it; remove it or change type",
        ),
        Rule(
            "!has(self.virtualTokens) || !has(self.virtualTokens.initText) || self.virtualTokens.initText == '' || "
            "self.type == 'PromptTuning'",
            "virtualTokens.initText: only PromptTuning starts from a text; remove it",
            field="virtualTokens.initText",
        ),
        Rule(
            "!has(self.virtualTokens) || !self.virtualTokens.projection || self.type == 'PrefixTuning'",
            "virtualTokens.projection: only PrefixTuning has one; remove it",
            field="virtualTokens.projection",
        ),
        Rule(
            "self.type != 'QLoRA' || !has(self.quantization) || self.quantization.type in ['NF4', 'FP4']",
            "quantization.type: QLoRA trains on 4-bit weights; use NF4 or FP4, or method.type LoRA",
            field="quantization.type",
        ),
        Rule(
            "self.type != 'LoRA' || !has(self.quantization) || self.quantization.type in ['INT8', 'None']",
            "quantization.type: LoRA on 4-bit weights is QLoRA; use method.type QLoRA, or INT8 or None",
            field="quantization.type",
        ),
        Rule(
            "!has(self.lora) || !(self.lora.initialization in ['PiSSA', 'OLoRA']) || "
            "(self.type == 'LoRA' && (!has(self.quantization) || self.quantization.type == 'None'))",
            "lora.initialization: PiSSA and OLoRA change the base weights and cannot change quantized ones; "
            "use method.type LoRA without quantization",
            field="lora.initialization",
        ),
        Rule(
            "!has(self.lora) || !self.lora.useDora || !has(self.quantization) || self.quantization.type != 'INT8'",
            "lora.useDora: DoRA reads the base weights in every step, which INT8 layers do not give; use method.type "
            "QLoRA, or quantization.type None",
            field="lora.useDora",
        ),
        Rule(
            "!has(self.lora) || self.lora.initialization != 'LoftQ' || self.type == 'QLoRA'",
            "lora.initialization: LoftQ makes up for 4-bit quantization; use it with method.type QLoRA",
            field="lora.initialization",
        ),
    )

    type: Literal["QLoRA", "LoRA", "AdaLoRA", "IA3", "PrefixTuning", "PromptTuning", "PTuning"] = Field(
        default="QLoRA",
        description="QLoRA (default): LoRA on a 4-bit base model. LoRA: on the unquantized (or INT8) one, about a "
        "third faster where it fits. AdaLoRA, IA3, PrefixTuning, PromptTuning, PTuning: the other methods of PEFT.",
    )
    # The blocks below may be absent in the object; their defaults hold then.
    lora: Lora = Field(default_factory=Lora, description="Options of QLoRA and LoRA.")
    quantization: Quantization = Field(
        default_factory=Quantization,
        description="How the base model is quantized. Default: NF4 for QLoRA, None for the other methods.",
    )
    ada_lora: AdaLora = Field(default_factory=AdaLora, description="Options of AdaLoRA.")
    ia3: IA3 = Field(default_factory=IA3, description="Options of IA3.")
    virtual_tokens: VirtualTokens = Field(
        default_factory=VirtualTokens, description="Options of PrefixTuning, PromptTuning and PTuning."
    )

    @model_validator(mode="before")
    @classmethod
    def _quantize_only_qlora_by_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and "quantization" not in data and data.get("type", "QLoRA") != "QLoRA":
            return {**data, "quantization": {"type": "None"}}
        return data
