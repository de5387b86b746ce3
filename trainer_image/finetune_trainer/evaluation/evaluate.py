"""Base model against adapter: loss, perplexity and token accuracy on held-out rows, and answers to sample prompts."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune_operator.api.evaluation import Gate
from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.finetunestatus import EvaluationStatus
from finetune_trainer.data.batches import Row, Rows
from finetune_trainer.evaluation.gates import judge
from finetune_trainer.evaluation.tasks.results import Measured
from finetune_trainer.inputs import CHAT_TEMPLATE
from finetune_trainer.methods.initialization import Tensors, as_base
from finetune_trainer.objectives.objective import Objective, batch_totals
from finetune_trainer.storage.store import Store
from finetune_trainer.training.attention import generating
from finetune_trainer.training.distributed import World, accompanied, summed
from finetune_trainer.training.schedule import passes_of_rank

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
ANSWER_TOKENS = 128


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, objective: Objective, rows: Rows, micro_batch: int, world: World, device: torch.device
) -> dict[str, float]:
    """The objective's metrics over all rows: token-weighted for SFT, so that the packing of rows does not matter."""
    was_training = model.training
    model.eval()
    mine, most = passes_of_rank(list(range(len(rows))), world.rank, world.size, micro_batch)

    def chunks(go: Callable[[list[Row]], object]) -> Iterator[list[Row]]:
        return ([rows[index] for index in chunk] for chunk in accompanied(mine, most, lambda: go([rows[0]])))

    totals = batch_totals(objective, model, chunks(lambda row: objective.total(model, row, device)), world, device)
    sums = dict.fromkeys(objective.sums, 0.0)
    for chunk in chunks(lambda row: objective.measure(model, row, totals, device)):
        measured = objective.measure(model, chunk, totals, device)
        sums = {name: value + measured[name] for name, value in sums.items()}
    model.train(was_training)
    sums = dict(zip(sums, summed(world, *sums.values(), device=device), strict=True))
    return {name: round(value, 6) for name, value in objective.metrics(sums, totals).items()}


def compare(
    model: "PeftModel",
    initial: Tensors,
    measure: Callable[[], dict[str, float]],
    gates: list[Gate],
    known: Mapping[str, float] | None = None,
    tasks: Measured | None = None,
) -> EvaluationStatus:
    """Base and adapter on the same rows, and the gates' verdict; without held-out rows `measure` gives nothing.

    `known`: the base model's metrics where they need not be measured (Objective.base). `tasks`: what they answered.
    """
    adapter = measure()
    if known is None:
        with as_base(model, initial):
            base = measure() if adapter else {}
    else:
        base = {metric: value for metric, value in known.items() if metric in adapter}
    for metric, value in adapter.items():
        compared = f", base model {base[metric]:.4f}" if metric in base else ""
        log.info("evaluation: %s %.4f%s", metric, value, compared)
    kept = tasks.kept(gates) if tasks else []
    base |= {one.metric: one.base for one in kept}
    adapter |= {one.metric: one.adapter for one in kept}
    judged = judge(gates, base, adapter, [one.metric for one in kept if one.lower])
    return judged.model_copy(update={"tasks": tasks.digest if tasks else ""})


def write_answers(
    store: Store, key: str, model: Any, initial: Tensors, spec: FineTuneSpec, folder: Path, dataset: Path
) -> list[dict[str, str]]:
    """Greedy answers of base and adapter to `evaluation.samples`, at most ANSWER_TOKENS long, as JSON in the bucket."""
    prompts = spec.evaluation.samples
    if not prompts:
        return []
    tokenizer = load_tokenizer(folder, dataset, spec.base_model.trust_remote_code)
    with generating(model.get_base_model()):
        tuned = [answer(model, tokenizer, prompt) for prompt in prompts]
        with as_base(model, initial):
            plain = [answer(model, tokenizer, prompt) for prompt in prompts]
    told = [{"prompt": p, "base": b, "adapter": a} for p, b, a in zip(prompts, plain, tuned, strict=True)]
    store.put_json(key, told)
    return told


@torch.no_grad()
def answer(model: Any, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
    """One greedy answer; the prompt is rendered by the chat template where there is one."""
    model.eval()
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(prompt)["input_ids"]
    given = torch.tensor([ids], device=model.device)
    made = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True)).strip()


def load_tokenizer(folder: Path, dataset: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The base model's tokenizer, with prepare's chat template where the model has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    template = dataset / CHAT_TEMPLATE
    if not tokenizer.chat_template and template.exists():
        tokenizer.chat_template = template.read_text()
    return tokenizer
