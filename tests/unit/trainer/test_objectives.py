"""Every objective has TRL's loss and gradient on the same batch, however the batch is cut and laid out."""

import math
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune_trainer.data.batches import IGNORE, Row, Rows, answered, batch_rows, padded
from finetune_trainer.evaluation.evaluate import compare
from finetune_trainer.memory.plan import Plan
from finetune_trainer.methods.configs import trainable
from finetune_trainer.methods.servable import SCORES, fold_refusal, merge_refusal, mount_refusal
from finetune_trainer.objectives.objective import Referring, batch_totals, make_objective
from finetune_trainer.objectives.reference import rows_used, set_references
from finetune_trainer.objectives.reward import last_tokens
from finetune_trainer.results.adapter import write_adapter
from finetune_trainer.training.checkpoint import Snapshot, read, write
from finetune_trainer.training.distributed import World
from finetune_trainer.training.quantization import load_base_model
from finetune_trainer.training.schedule import micro_batches

from .small_run import CPU, FP32, Setup, run_spec
from .tiny import finetune_spec, make_judged, write_dataset

ROWS = 6
WEIGHTS = {"desirableWeight": 1.3, "undesirableWeight": 0.7}
METHOD = {"type": "LoRA", "lora": {"rank": 4, "alpha": 8, "dropout": 0}}


class Case(Setup):
    """Rows for an objective, and a tiny model that starts, or goes on, to learn them."""

    def __init__(
        self, kind: str, folder: Path, model: Path, layout: str = "flat", snapshot: Snapshot | None = None, **parts: Any
    ) -> None:
        objective = {"type": kind} | (WEIGHTS if kind == "KTO" else {})
        self.spec = finetune_spec(**{"method": METHOD, "objective": objective} | parts)
        super().__init__(folder, model, self.spec, snapshot, micro_batch=2, layout=layout)

    def moved(self) -> "Case":
        """Its adapter moved away from the base model, as by some training."""
        torch.manual_seed(1)
        for parameter in trainable(self.model).values():
            parameter.data += 0.05 * torch.randn_like(parameter)
        return self

    def batch(self) -> list[Row]:
        return [self.rows[index] for index in range(ROWS)]

    def batch_loss(self, micro_batch: int = ROWS) -> tuple[float, list[torch.Tensor]]:
        """The loss of the whole batch and its gradient."""
        chunks = [[self.rows[i] for i in chunk] for chunk in micro_batches(list(range(ROWS)), micro_batch)]
        totals = batch_totals(self.objective, self.model, chunks, World(), CPU)
        self.model.zero_grad()
        loss = sum(float(self.objective.backward(self.model, chunk, totals, 1.0, CPU)) for chunk in chunks)
        return loss, self.gradients()

    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad.clone() for parameter in trainable(self.model).values() if parameter.grad is not None]

    def plain(self) -> Any:
        """The model with its own attention, as TRL calls it."""
        self.model.get_base_model().set_attn_implementation("sdpa")
        return self.model


def laid_out(rows: list[Row]) -> dict[str, torch.Tensor]:
    """The rows' samples as TRL pads them: ids, attention, and which is answer."""
    batch = padded(rows)
    ids, mask = batch.input_ids, batch.attention_mask
    assert mask is not None
    answers = torch.zeros_like(ids)
    answers[:, 1:] = batch.targets[:, :-1] != IGNORE
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": answers}


def in_trl_order(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All chosen samples first, then all rejected ones."""
    return {name: torch.cat([tensor[0::2], tensor[1::2]]) for name, tensor in inputs.items()}


def trainer(model: Any, **options: Any) -> SimpleNamespace:
    """What TRL's loss functions look at of their trainer."""
    as_it_is = {name: lambda value: value for name in ("gather", "gather_for_metrics", "unwrap_model")}
    return SimpleNamespace(
        model=model,
        ref_model=None,
        accelerator=SimpleNamespace(device=CPU, **as_it_is),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, center_rewards_coefficient=None),
        beta=0.1,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        is_encoder_decoder=False,
        padding_value=0,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )


def trl_dpo(case: Case) -> torch.Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    options = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False}
    its = trainer(case.plain(), loss_types=["sigmoid"], loss_weights=[1.0], **options)
    return DPOTrainer._compute_loss(its, its.model, in_trl_order(laid_out(case.batch())), False)


def trl_kto(case: Case) -> torch.Tensor:
    from trl.trainer.kto_trainer import KTOTrainer

    its = trainer(
        case.plain(), calculate_KL=True, loss_type="kto", desirable_weight=1.3, undesirable_weight=0.7, beta_kl=None
    )
    its._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(its, model, batch)
    foreign = laid_out([row.mismatched for row in case.batch() if row.mismatched])
    inputs = laid_out(case.batch()) | {f"KL_{name}": tensor for name, tensor in foreign.items()}
    labels = torch.tensor([row.good for row in case.batch()])
    return KTOTrainer._compute_loss(its, its.model, inputs | {"label": labels}, False)


def trl_orpo(case: Case) -> torch.Tensor:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    inputs, batch = laid_out(case.batch()), {}
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
    for which, name in enumerate(("chosen", "rejected")):
        batch |= {f"{name}_{key}": tensor[which::2] for key, tensor in inputs.items()}
    its = trainer(case.plain())
    its.concatenated_inputs, its.get_batch_logps = ORPOTrainer.concatenated_inputs, ORPOTrainer.get_batch_logps
    its.concatenated_forward = lambda model, batch: ORPOTrainer.concatenated_forward(its, model, batch)
    its.odds_ratio_loss = lambda *logps: ORPOTrainer.odds_ratio_loss(its, *logps)
    return ORPOTrainer.get_batch_loss_metrics(its, its.model, batch)[0]


def trl_reward(case: Case) -> torch.Tensor:
    from trl.trainer.reward_trainer import RewardTrainer

    its = trainer(case.plain())
    inputs = in_trl_order(laid_out(case.batch()))
    del inputs["completion_mask"]
    return RewardTrainer.compute_loss(its, its.model, inputs)


TRL = {"DPO": trl_dpo, "KTO": trl_kto, "ORPO": trl_orpo, "Reward": trl_reward}


@pytest.mark.parametrize("kind", TRL)
def test_loss_and_gradient_are_those_of_trl(
    kind: str, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.trainer.utils import add_fused_lm_head

    case = Case(kind, tmp_path, tiny_llama).moved()
    loss, gradients = case.batch_loss()
    case.model.zero_grad()
    if kind in ("DPO", "KTO"):
        add_fused_lm_head(case.model.get_base_model(), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    theirs = TRL[kind](case)
    theirs.backward()
    assert loss == pytest.approx(float(theirs), abs=1e-6)
    for ours, other in zip(gradients, case.gradients(), strict=True):
        assert torch.allclose(ours, other, atol=1e-6), (ours - other).abs().max()
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-4


@pytest.mark.parametrize("kind", TRL)
def test_the_loss_is_the_same_however_the_batch_is_cut_and_padded(kind: str, tmp_path: Path, tiny_llama: Path) -> None:
    layouts = ["padded"] if kind == "Reward" else ["flat", "padded"]
    found = []
    for layout in layouts:
        case = Case(kind, tmp_path, tiny_llama, layout).moved()
        found += [case.batch_loss(micro_batch) for micro_batch in (ROWS, 1, 4)]
    loss, gradients = found[0]
    for other, others in found[1:]:
        assert other == pytest.approx(loss, abs=1e-6)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, others, strict=True))


LEARNING = {"training": {"learningRate": 0.02, "batchSize": 4, "precision": "FP32", "maxLength": 64, "maxSteps": 8}}
DROPOUT = {"type": "LoRA", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
PISSA = {"type": "LoRA", "lora": {"rank": 4, "alpha": 8, "initialization": "PiSSA"}}


@pytest.mark.parametrize(
    ("kind", "method"),
    [("DPO", DROPOUT), ("DPO", PISSA), ("KTO", DROPOUT), ("ORPO", DROPOUT), ("Reward", DROPOUT), ("Reward", PISSA)],
)
def test_every_objective_learns_and_resumes_bitwise(
    kind: str, method: dict[str, Any], tmp_path: Path, tiny_llama: Path
) -> None:
    case = Case(kind, tmp_path / "whole", tiny_llama, method=method, **LEARNING)
    case.run(3)
    write(case.fit.snapshot().on_cpu(), tmp_path / "step-3")
    losses = case.run(5)
    judged = compare(
        case.model, case.initial, lambda: case.measure(case.rows), case.spec.evaluation.gates, case.objective.base
    )
    assert judged.adapter["reward_accuracy"] == 1 and judged.adapter["reward_margin"] > 0.05
    assert judged.base.get("loss", math.inf) > judged.adapter["loss"]

    snapshot = read(tmp_path / "step-3")
    again = Case(kind, tmp_path / "again", tiny_llama, snapshot=snapshot, method=method, **LEARNING)
    assert again.run(5) == losses
    for name, parameter in case.fit.parameters.items():
        assert torch.equal(parameter, again.fit.parameters[name]), name


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("method", [METHOD, PISSA])
def test_the_base_model_is_the_reference_whatever_the_adapter_starts_from(
    kind: str, method: dict[str, Any], tmp_path: Path, tiny_llama: Path
) -> None:
    case = Case(kind, tmp_path, tiny_llama, method=method)
    case.model.eval()
    base = load_base_model(tiny_llama, case.spec, FP32, CPU)
    plain = make_objective(case.spec, "padded", CPU, FP32)
    assert isinstance(plain, Referring)
    with torch.no_grad():
        expected = plain.logprobs(base, case.batch(), CPU)
    assert torch.allclose(case.reference["train"], expected, atol=1e-4)
    assert case.loss() == pytest.approx(case.objective.base["loss"], abs=1e-4)


def test_references_are_computed_for_the_rows_that_a_short_run_sees(tmp_path: Path, tiny_llama: Path) -> None:
    case = Case("DPO", tmp_path, tiny_llama)
    used = rows_used(Plan(steps=1, batch_size=4, micro_batch=4, rows=ROWS), seed=42)
    assert used == sorted(batch_rows(0, 4, ROWS, 42)) and len(used) == 4
    assert rows_used(Plan(steps=2, batch_size=4, micro_batch=4, rows=ROWS), seed=42) == list(range(ROWS))
    splits = {"train": (case.rows, used)}
    found = set_references(case.model, case.initial, case.objective, splits, 2, World(), CPU, None)["train"]
    assert sorted(torch.isfinite(found).all(1).nonzero()[:, 0].tolist()) == used


@pytest.mark.parametrize("method", [METHOD, {"type": "QLoRA", "lora": {"rank": 4, "alpha": 8}}, PISSA])
def test_a_reward_model_reloads_with_its_head(method: dict[str, Any], tmp_path: Path, tiny_llama: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    case = Case("Reward", tmp_path, tiny_llama, method=method, **LEARNING)
    case.run(2)
    config = write_adapter(case.model, run_spec(case.spec), tmp_path / "adapter", case.initial)
    assert mount_refusal(config) == merge_refusal(config) == SCORES and not fold_refusal(config)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert [name for name in names if "lora_" not in name] == ["base_model.model.score.weight"]

    case.model.eval()
    torch.manual_seed(7)  # the head of a fresh model is another one
    plain = case.spec.model_copy(update={"training": case.spec.training.model_copy(update={"seed": 7})})
    reloaded = PeftModel.from_pretrained(
        load_base_model(tiny_llama, plain, FP32, CPU), str(tmp_path / "adapter")
    ).eval()
    batch = padded(case.batch())
    with torch.no_grad():
        scores = case.objective.scores(case.model, batch)
        theirs = reloaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    assert torch.allclose(scores, theirs, atol=1e-5), (scores - theirs).abs().max()


def test_a_score_is_read_at_the_last_token_that_is_no_padding() -> None:
    rows = [answered(np.array([5, 6], np.int32), np.array([7, 0], np.int32), np.array([8, 9, 9], np.int32))]
    assert last_tokens(padded(rows), padding=0).tolist() == [2, 4]
    assert last_tokens(padded(rows), padding=None).tolist() == [3, 4]


def test_a_judged_answer_is_compared_with_one_that_belongs_to_another_prompt(tmp_path: Path) -> None:
    rows = Rows(write_dataset(tmp_path, make_judged(4)), "train", tmp_path / "scratch")
    first, second, third = (rows[index] for index in range(3))
    assert np.array_equal(first.labels[first.labels != IGNORE][:2], [10, 11]) and first.good
    assert not second.good
    for row, other in ((first, rows[3]), (second, rows[3]), (third, second)):
        assert row.mismatched is not None
        ids = row.mismatched.input_ids
        answer = ids[row.mismatched.labels != IGNORE]
        prompt = row.input_ids[row.labels == IGNORE]
        assert np.array_equal(ids[: len(prompt)], prompt)
        assert np.array_equal(answer, other.input_ids[other.labels != IGNORE][: len(answer)])
        assert len(ids) <= rows.longest_answered
