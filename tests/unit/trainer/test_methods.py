"""Every method, trained: it learns, goes on bitwise, reloads on a fresh base, merges, and says how it can be served."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.digest import hash_tree
from finetune_trainer.failures import RunFailure
from finetune_trainer.merge import combine
from finetune_trainer.mergespec import MergeSpec
from finetune_trainer.methods.combinations import refusals
from finetune_trainer.methods.initialization import starts_from_weights
from finetune_trainer.methods.servable import merge_refusal, mount_refusal, rank_of
from finetune_trainer.results.adapter import write_adapter
from finetune_trainer.runspec import Storage
from finetune_trainer.training.checkpoint import read, write
from finetune_trainer.training.precision import choose_precision
from finetune_trainer.training.quantization import load_base_model

from .families import make_model
from .small_run import CPU, Setup, logits, run_spec
from .tiny import finetune_spec, make_llama


def lora(kind: str = "LoRA", quantization: str = "", **options: Any) -> dict[str, Any]:
    method: dict[str, Any] = {"type": kind, "lora": {"rank": 4, "alpha": 8} | options}
    return method | ({"quantization": {"type": quantization}} if quantization else {})


def on(quantization: str, kind: str) -> dict[str, Any]:
    return {"type": kind, "quantization": {"type": quantization}}


PATTERNS = {"rankPattern": {"q_proj": 8}, "alphaPattern": {"q_proj": 4, "v_proj": 12}}
METHODS: dict[str, dict[str, Any]] = {
    "qlora": lora("QLoRA"),
    "fp4": lora("QLoRA", "FP4"),
    "int8": lora("LoRA", "INT8"),
    "rslora": lora(useRslora=True),
    "dora": lora(useDora=True),
    "dora on nf4": lora("QLoRA", useDora=True),
    "gaussian": lora(initialization="Gaussian"),
    "pissa": lora(initialization="PiSSA"),
    "pissa with rslora and patterns": lora(initialization="PiSSA", useRslora=True, **PATTERNS),
    "olora": lora(initialization="OLoRA"),
    "olora with biases": lora(initialization="OLoRA", bias="All"),
    "pissa and a whole head": lora(initialization="PiSSA", modulesToSave=["lm_head"], layersToTransform=[1]),
    "eva": lora(initialization="EVA", targetModules=["q_proj"]),
    "loftq": lora("QLoRA", initialization="LoftQ"),
    "loftq on fp4 with patterns": lora("QLoRA", "FP4", initialization="LoftQ", **PATTERNS),
    "loftq on gpt-2": lora("QLoRA", initialization="LoftQ"),
    "gpt-2 on nf4": lora("QLoRA"),
    "falcon on nf4": lora("QLoRA"),
    "lora+": lora(loraPlusRatio=16),
    "patterns": lora(**PATTERNS),
    "one layer": lora(layersToTransform=[1]),
    "regex": lora(targetModules=[r".*\.(q|v)_proj"], excludeModules=["v_proj"]),
    "whole head on nf4": lora("QLoRA", modulesToSave=["lm_head"]),
    "whole head and embedding": lora(modulesToSave=["lm_head", "embed_tokens"]),
    "whole layers": lora(modulesToSave=["down_proj"]),
    "bias of the targets on int8": lora("LoRA", "INT8", bias="LoraOnly", targetModules=["q_proj"]),
    "all biases on nf4": lora("QLoRA", bias="All"),
    "adalora": {"type": "AdaLoRA", "adaLora": {"initialRank": 6, "targetRank": 3}},
    "adalora on nf4": on("NF4", "AdaLoRA"),
    "ia3": {"type": "IA3"},
    "ia3 of every layer": {"type": "IA3", "ia3": {"targetModules": ["all-linear"]}},
    "ia3 of outputs": {"type": "IA3", "ia3": {"targetModules": ["v_proj", "o_proj", "up_proj"]}},
    "ia3 on nf4": on("NF4", "IA3"),
    "ia3 on int8": on("INT8", "IA3"),
    "prefix": {"type": "PrefixTuning", "virtualTokens": {"count": 4}},
    "prefix with projection": {"type": "PrefixTuning", "virtualTokens": {"count": 4, "projection": True}},
    "prompt": {"type": "PromptTuning", "virtualTokens": {"count": 4}},
    "prompt from text on nf4": on("NF4", "PromptTuning") | {"virtualTokens": {"count": 6, "initText": "alpha beta"}},
    "p-tuning": {"type": "PTuning", "virtualTokens": {"count": 4}},
}
NOT_MOUNTED = {
    "olora with biases", "pissa and a whole head", "dora", "dora on nf4", "whole head on nf4", "whole head and embedding", "whole layers", "bias of the targets on int8",
    "all biases on nf4", "ia3", "ia3 of every layer", "ia3 of outputs", "ia3 on nf4", "ia3 on int8",
}  # fmt: skip
NOT_SERVED = {"prefix", "prefix with projection", "prompt", "prompt from text on nf4", "p-tuning"}
# The tiny model's head is its embedding, and its projections have biases, where that matters.
MODELS: dict[str, dict[str, Any]] = {
    "whole head and embedding": {"tie_word_embeddings": True},
    "bias of the targets on int8": {"attention_bias": True},
    "all biases on nf4": {"attention_bias": True, "mlp_bias": True},
    "olora with biases": {"attention_bias": True},
}
FAMILY = {"loftq on gpt-2": "gpt2", "gpt-2 on nf4": "gpt2", "falcon on nf4": "falcon"}  # of those that are no Llama


@dataclass
class Trained:
    """One method, trained for eight steps with a checkpoint in the middle, and its artifact."""

    name: str
    folder: Path
    base: Path

    @cached_property
    def spec(self) -> Any:
        return finetune_spec(method=METHODS[self.name], training={"learningRate": 0.02})

    @cached_property
    def setup(self) -> Setup:
        setup = Setup(self.folder / "whole", self.base, self.spec)
        self.untrained = logits(setup.model, setup.initial, base=True)
        self.before = setup.loss()
        setup.run(4)
        write(setup.fit.snapshot().on_cpu(), self.folder / "step-4")
        setup.run(4)
        return setup

    @cached_property
    def adapter(self) -> Path:
        write_adapter(self.setup.model, run_spec(self.spec), self.folder / "adapter", self.setup.initial)
        return self.folder / "adapter"

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.adapter / "adapter_config.json").read_text())
        return found

    @property
    def manifest(self) -> dict[str, Any]:
        """What adapter.lineage says that a merge goes by."""
        quantization = self.spec.method.quantization
        return {
            "quantization": quantization.type,
            "doubleQuant": quantization.double_quant,
            "onOriginalWeights": starts_from_weights(self.spec),
        }

    def fresh(self, spec: Any) -> Any:
        from peft import PeftModel

        base = load_base_model(self.base, spec, choose_precision("FP32", "cpu", False), CPU)
        return PeftModel.from_pretrained(base, str(self.adapter))


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Trained:
    name, folder = request.param, tmp_path_factory.mktemp("method")
    if name in FAMILY:
        return Trained(name, folder, make_model(folder / "model", FAMILY[name]))
    return Trained(name, folder, make_llama(folder / "model", **MODELS[name]) if name in MODELS else tiny_llama)


def test_a_method_learns_and_leaves_the_base_model_as_it_was(trained: Trained) -> None:
    assert list(refusals(trained.spec)) == []
    setup = trained.setup
    assert setup.loss() < trained.before
    base = logits(setup.model, setup.initial, base=True)
    assert torch.allclose(base, trained.untrained, atol=1e-5)
    assert not torch.allclose(logits(setup.model, setup.initial), base, atol=1e-3)


def test_a_method_goes_on_bitwise_from_a_checkpoint(trained: Trained) -> None:
    whole = trained.setup
    resumed = Setup(trained.folder / "resumed", trained.base, trained.spec, snapshot=read(trained.folder / "step-4"))
    # Every run computes without training before its first step (layout.py measures the isolation of samples), and
    # INT8 layers of bitsandbytes compute differently from then on.
    resumed.loss()
    assert resumed.run(4) == [line["loss"] for line in whole.fit.state.metrics]
    for parameter, other in zip(whole.fit.parameters.values(), resumed.fit.parameters.values(), strict=True):
        assert torch.equal(parameter, other)
    write_adapter(resumed.model, run_spec(trained.spec), trained.folder / "again", resumed.initial)
    assert hash_tree(trained.folder / "again") == hash_tree(trained.adapter)


def test_an_adapter_reloads_on_a_fresh_base_with_the_same_logits(trained: Trained) -> None:
    wanted = logits(trained.setup.model, trained.setup.initial)
    if trained.spec.method.lora.initialization != "LoftQ":
        reloaded = logits(trained.fresh(trained.spec))
        assert torch.allclose(reloaded, wanted, atol=1e-4), (reloaded - wanted).abs().max()
        return
    # LoftQ's adapter belongs on the original weights: there it is nearer to what was trained than 4 bits are to them.
    unquantized = trained.spec.model_copy(update={"method": finetune_spec().method})
    reloaded = trained.fresh(unquantized)
    with reloaded.disable_adapter():
        original = logits(reloaded)
    in_4_bits = load_base_model(trained.base, trained.spec, choose_precision("FP32", "cpu", False), CPU)
    with torch.no_grad():
        quantized = in_4_bits(input_ids=torch.arange(5, 25)[None]).logits
    assert (logits(reloaded) - wanted).abs().mean() < (quantized - original).abs().mean()


def test_an_adapter_says_how_it_can_be_served(trained: Trained) -> None:
    assert bool(mount_refusal(trained.config)) == (trained.name in NOT_MOUNTED | NOT_SERVED)
    assert bool(merge_refusal(trained.config)) == (trained.name in NOT_SERVED)
    if not mount_refusal(trained.config):
        assert rank_of(trained.config) >= 1
        assert trained.config["init_lora_weights"] is True


def test_a_merged_model_answers_as_the_mounted_adapter_does(trained: Trained) -> None:
    merge = MergeSpec(
        name="bot", storage=Storage(uri="s3://finetune"), base_uri="", adapter_uri="", adapter_digest="sha256:",
        precision="FP32", prompts=["alpha beta gamma one two three"],
    )  # fmt: skip
    output = trained.folder / "merged"
    if trained.name in NOT_SERVED:
        with pytest.raises(RunFailure, match="bot: .* adds tokens and changes no weights"):
            combine(merge, trained.base, trained.adapter, trained.manifest, output)
        return
    combine(merge, trained.base, trained.adapter, trained.manifest, output)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        merged = plain.eval()(input_ids=torch.arange(5, 25)[None]).logits
    spec = trained.spec
    if trained.manifest["onOriginalWeights"]:
        spec = spec.model_copy(update={"method": finetune_spec().method})
    mounted = logits(trained.fresh(spec))
    # an INT8 layer rounds what comes in, too, which a merged one does not
    assert torch.allclose(merged, mounted, atol=0.1 if "int8" in trained.name else 1e-4), (merged - mounted).abs().max()
