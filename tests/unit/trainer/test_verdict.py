"""Verdicts: what fits, how the base model lies on the GPUs, and what would fit."""

import re
from typing import Any

import pytest

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.memory.architecture import architecture
from finetune_trainer.memory.estimate import GIB, Workload, estimate, longest_row
from finetune_trainer.memory.verdict import placed, verdict
from finetune_trainer.methods.combinations import SHARING_RULES

from .test_estimate import ATTENTION, shape, spec
from .tiny import finetune_spec


def test_a_70b_model_does_not_fit_a_24_gb_gpu_whatever_people_say() -> None:
    asked = spec(resources={"gpuMemory": "24Gi"}, training={"maxLength": 512})
    found = verdict(shape("Llama-3.1-70B"), Workload(asked, 512))
    assert (found.verdict, found.largest_micro_batch) == ("DoesNotFit", 0)
    assert "one GPU has 24.0Gi" in found.message
    assert "a GPU with 4" in found.message


def test_a_verdict_names_the_largest_micro_batch() -> None:
    sizes = []
    for memory in ("10Gi", "16Gi", "24Gi", "80Gi"):
        found = verdict(shape("Llama-3.1-8B"), Workload(spec(resources={"gpuMemory": memory}), 1024))
        assert found.verdict == "Fits", memory
        sizes.append(found.largest_micro_batch or 0)
    assert sizes == sorted(sizes)
    assert sizes[0] >= 1
    assert sizes[-1] == 16  # never more than the batch


def test_what_would_fit_is_said() -> None:
    found = verdict(shape("Llama-3.1-8B"), Workload(spec("LoRA", resources={"gpuMemory": "12Gi"}), 1024))
    assert found.verdict == "DoesNotFit"
    assert "method.type: QLoRA" in found.message
    long = verdict(shape("Llama-3.1-8B"), Workload(spec(resources={"gpuMemory": "10Gi"}), 32768))
    assert "training.maxLength: " in long.message


def test_without_gpu_memory_the_verdict_is_unknown_and_says_what_to_set() -> None:
    found = verdict(shape("Llama-3.1-8B"), Workload(spec(), 1024))
    assert found.verdict == "Unknown"
    assert found.message == "set resources.gpuMemory to be told whether this fits"
    assert found.gpu_memory


def test_checkpointing_is_chosen_only_when_it_is_needed() -> None:
    roomy = verdict(shape("notes-100M"), Workload(spec(resources={"gpuMemory": "24Gi"}), 1024))
    tight = verdict(shape("Llama-3.1-8B"), Workload(spec(resources={"gpuMemory": "12Gi"}), 1024))
    assert roomy.gradient_checkpointing is False
    assert tight.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("model", "method", "gpus", "memory", "shards", "largest"),
    [
        # Published: "70B on two GPUs of 24 GB" (bitsandbytes' guide to FSDP-QLoRA). So it is, with nothing to spare.
        ("Llama-3.1-70B", "QLoRA", 2, "24Gi", 2, 1),
        ("Llama-3.1-70B", "QLoRA", 4, "24Gi", 4, 4),
        ("Llama-3.1-70B", "QLoRA", 2, "48Gi", None, 4),
        ("Llama-3.1-70B", "LoRA", 2, "80Gi", 2, 4),
        ("Llama-3.1-70B", "LoRA", 4, "48Gi", 4, 4),
        ("Llama-3.1-8B", "LoRA", 2, "12Gi", 2, 1),
        ("Llama-3.1-8B", "LoRA", 2, "24Gi", None, 8),
        ("Llama-3.1-8B", "QLoRA", 16, "24Gi", None, 1),
    ],
)
def test_gpus_share_a_base_model_only_when_one_of_them_has_no_room_for_it(
    model: str, method: str, gpus: int, memory: str, shards: int | None, largest: int
) -> None:
    asked = spec(method, 16, ATTENTION, resources={"gpus": gpus, "gpuMemory": memory})
    found = verdict(shape(model), Workload(asked, 512))
    assert (found.verdict, found.shards, found.largest_micro_batch) == ("Fits", shards, largest)
    assert ("shared out over" in found.message) == (shards is not None)
    assert found.gradient_checkpointing or shards is None


def test_a_model_that_does_not_fit_is_told_how_many_gpus_would_do() -> None:
    for gpus, enough in ((1, 16), (2, 16), (16, None)):
        asked = spec("LoRA", 16, ATTENTION, resources={"gpus": gpus, "gpuMemory": "24Gi"})
        found = verdict(shape("Llama-3.1-70B"), Workload(asked, 512))
        assert (found.verdict == "Fits") == (enough is None)
        assert enough is None or f"{enough} GPUs that share the base model" in found.message


def test_shards_are_a_part_of_the_weights_and_what_is_gathered() -> None:
    asked = spec("QLoRA", 16, ATTENTION)
    whole, half = (
        {part.name: part.expected for part in estimate(shape("Llama-3.1-70B"), work, 1, True).parts}
        for work in (Workload(asked, 512), Workload(asked, 512, shards=2))
    )
    head = 128256 * 8192 * 2  # larger than two blocks in NF4
    assert half.pop("gathered blocks") == head
    assert half.pop("weights") == pytest.approx(whole.pop("weights") / 2, rel=1e-3)
    assert half == whole


REFUSED: list[dict[str, Any]] = [
    {"method": {"type": "PrefixTuning"}},
    {"training": {"gradientCheckpointing": "Disabled"}},
]


@pytest.mark.parametrize("parts", REFUSED)
def test_what_cannot_compute_a_block_twice_is_never_shared_out(parts: dict[str, Any]) -> None:
    base = {"resources": {"gpus": 2, "gpuMemory": "12Gi"}, "training": {"precision": "BF16", "batchSize": 8}}
    asked = finetune_spec(**{**base, **parts, "training": base["training"] | parts.get("training", {})})
    work = Workload(asked, 512)
    assert placed(shape("Llama-3.1-8B"), work, 12 * GIB).shards == 1
    found = verdict(shape("Llama-3.1-8B"), work)
    assert found.verdict == "DoesNotFit"
    assert "the GPUs cannot share the base model: " in found.message


SHARED: list[dict[str, Any]] = [
    *({"type": "LoRA", "lora": {"initialization": start}} for start in ("PiSSA", "OLoRA", "EVA")),
    {"type": "LoRA", "lora": {"useDora": True}},
    {"type": "LoRA", "lora": {"modulesToSave": ["up_proj"], "layersToTransform": [0], "targetModules": ["q_proj"]}},
    {"type": "QLoRA", "lora": {"initialization": "LoftQ"}},
    {"type": "QLoRA", "lora": {"useDora": True}},
]


@pytest.mark.parametrize("method", SHARED)
def test_what_reads_base_weights_for_its_start_is_shared_out_too(method: dict[str, Any]) -> None:
    asked = spec().model_copy(update={"method": finetune_spec(method=method).method})
    whole, half = (
        estimate(shape("Llama-3.1-8B"), Workload(asked, 512, shards=shards), 1, True).expected for shards in (1, 2)
    )
    between = (whole + half) / 2
    asked = asked.model_copy(
        update={"resources": asked.resources.model_copy(update={"gpus": 2, "gpu_memory": str(int(between))})}
    )
    assert half < whole
    assert placed(shape("Llama-3.1-8B"), Workload(asked, 512), between).shards == 2


def test_every_sharing_rule_names_a_field_and_a_way_out() -> None:
    for rule in SHARING_RULES:
        assert rule.message.startswith(("method.", "training.")) and "; use " in rule.message


def follow(asked: FineTuneSpec, advice: str, needed: str) -> FineTuneSpec:
    """The spec with a piece of advice done, and what each piece needs besides."""
    data = asked.model_dump(by_alias=True)
    for change in (advice, *needed.split(" and ")):
        if gpu := re.fullmatch(r"a GPU with (\d+) GiB or more", change):
            data["resources"]["gpuMemory"] = f"{gpu[1]}Gi"
        elif gpus := re.fullmatch(r"(\d+) GPUs that share the base model .*", change):
            data["resources"] |= {"gpus": int(gpus[1]), "nodes": 1}
        elif change:
            for line in change.split(" with "):
                path, _, value = line.partition(": ")
                *parents, last = path.split(".")
                part = data
                for name in parents:
                    part = part[name]
                part[last] = int(value) if value.isdigit() else value
                if path == "method.type":
                    data["method"]["quantization"]["type"] = "NF4"
    return FineTuneSpec.model_validate(data)


ADVISED = [
    (model, method, parts)
    for model in ("Llama-3.1-8B", "Llama-3.1-70B")
    for method in ("LoRA", "QLoRA")
    for parts in (
        {"training": {"maxLength": 1024, "batchSize": 16}},
        {"training": {"maxLength": 32768, "batchSize": 16}},
        {"training": {"maxLength": 2048, "batchSize": 16, "microBatchSize": 8}},
        {"training": {"maxLength": 4096, "batchSize": 16, "gradientCheckpointing": "Disabled"}},
        {"training": {"maxLength": 4096, "batchSize": 16, "gradientCheckpointing": "Disabled", "microBatchSize": 4}},
        {"training": {"maxLength": 2048, "batchSize": 16}, "objective": {"type": "DPO"}},
        {"training": {"maxLength": 8192, "batchSize": 16}, "resources": {"gpus": 4}},
        {"training": {"maxLength": 1024, "batchSize": 16}, "lora": {"useDora": True}},
        {"training": {"maxLength": 1024, "batchSize": 16}, "lora": {"modulesToSave": ["lm_head"]}},
    )
]


@pytest.mark.parametrize("memory", ["12Gi", "24Gi"])
def test_whoever_follows_one_piece_of_advice_fits(memory: str) -> None:
    followed = 0
    for model, method, parts in ADVISED:
        resources = {**parts.get("resources", {}), "gpuMemory": memory}
        asked = spec(method, 16, **{**parts, "resources": resources, "lora": dict(parts.get("lora", {}))})
        found = verdict(shape(model), Workload(asked, longest_row(asked)))
        if found.verdict == "Fits":
            continue
        message = (found.message or "").partition("; the GPUs cannot share")[0]
        if found.largest_micro_batch:
            change = f"training.microBatchSize: {found.largest_micro_batch}"
            advices, needed = [change], ""
        else:
            options, _, needed = message.partition("; what would fit: ")[2].partition("; each with ")
            advices = options.split(", or ")
        assert advices, message
        for advice in advices:
            changed = follow(asked, advice, needed)
            again = verdict(shape(model), Workload(changed, longest_row(changed)))
            assert again.verdict == "Fits", (model, method, parts, advice, needed, again.message)
            followed += 1
    assert followed > 10


def test_experts_are_not_shared_out() -> None:
    config = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
              "num_experts_per_tok": 2}  # fmt: skip
    mixtral = architecture(config)
    assert mixtral and mixtral.parameters == 46_702_792_704
    asked = spec("QLoRA", 16, ATTENTION, resources={"gpus": 4, "gpuMemory": "24Gi"})
    found = verdict(mixtral, Workload(asked, 512))
    assert found.verdict == "DoesNotFit" and "experts as those of a mixtral model are not shared out" in found.message
    weights = estimate(mixtral, Workload(asked, 512), 1, True).parts[0].expected
    assert weights > 2 * 32 * mixtral.experts.parameters  # which bitsandbytes leaves in 16 bit
