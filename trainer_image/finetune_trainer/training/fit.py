"""The training loop: steps that repeat exactly, an effective batch that never changes, checkpoints that lose nothing."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from finetune_operator.api.common import seconds
from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.data.batches import Row, Rows, batch_rows
from finetune_trainer.failures import NON_FINITE_LOSS, RunFailure
from finetune_trainer.memory.plan import Plan
from finetune_trainer.methods import configs
from finetune_trainer.methods.initialization import Tensors
from finetune_trainer.objectives.objective import Objective, batch_totals
from finetune_trainer.training.attention import lengths_now
from finetune_trainer.training.checkpoint import Snapshot, State
from finetune_trainer.training.distributed import World, sum_gradients, summed
from finetune_trainer.training.eager import no_compiler
from finetune_trainer.training.optimizers import make_optimizer, optimizer_state, restore_optimizer, set_learning_rate
from finetune_trainer.training.schedule import learning_rate_factor, micro_batches, rows_of_rank, warmup_steps

log = logging.getLogger(__name__)


class Fit:
    """One run in one process: the model, what is trained of it, and how far it has come."""

    def __init__(
        self,
        spec: FineTuneSpec,
        model: Any,
        objective: Objective,
        rows: Rows,
        plan: Plan,
        world: World,
        device: torch.device,
        scaled: bool = False,
        initial: Tensors | None = None,
        reference: Tensors | None = None,
    ) -> None:
        self.spec, self.model, self.objective, self.rows, self.plan = spec, model, objective, rows, plan
        self.world, self.device = world, device
        self.parameters = configs.trainable(model)
        self.optimizer = make_optimizer(spec, self.parameters)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.state = State()
        self.initial, self.reference = initial or {}, reference or {}
        self.best: Tensors = {}

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(
        self,
        save: Callable[[Snapshot], None],
        on_step: Callable[[], None],
        interrupted: Callable[[], bool],
        evaluate: Callable[[], float] | None = None,
    ) -> bool:
        """Train to the end, or until interrupted (then with a checkpoint saved); returns whether it came to the end."""
        self.model.train()
        due = CheckpointClock(self.spec.checkpoint.every, self.plan, self.state.step)
        while self.state.step < self.plan.steps and not self._out_of_patience():
            self.step()
            on_step()
            early = evaluate is not None and self._stop_early(evaluate)
            # All stop at the same step, whichever was told to; the first one's clock says when a checkpoint is due.
            due_now = self.world.leads and due(self.state.step)
            stop, save_now = summed(self.world, float(interrupted()), float(due_now), device=self.device)
            finished = early or self.state.step >= self.plan.steps
            if self.world.leads and (stop or save_now or finished):
                save(self.snapshot())
            if finished:
                break
            if stop:
                return False
        if self.best:
            self._restore(self.best)
        return True

    def step(self) -> None:
        """One optimizer step over exactly the effective batch."""
        begun = time.perf_counter()
        state, plan, training = self.state, self.plan, self.spec.training
        learning_rate = self.learning_rate()
        set_learning_rate(self.optimizer, learning_rate)
        batch = batch_rows(state.step, plan.batch_size, plan.rows, training.seed)
        mine = micro_batches(rows_of_rank(list(range(len(batch))), self.world.rank, self.world.size), plan.micro_batch)
        chunks = {places[0]: [self.rows[batch[place]] for place in places] for places in mine}
        totals = batch_totals(self.objective, self.model, self._seeded(chunks), self.world, self.device)
        loss = torch.zeros((), device=self.device)
        with neftune(self.model, training.neftune_alpha):
            for rows in self._seeded(chunks):
                loss += self.objective.backward(self.model, rows, totals, self.scaler.get_scale(), self.device)
        penalty = configs.penalty(self.model)
        if penalty is not None:
            (penalty * (self.scaler.get_scale() / self.world.size)).backward()
        mean = summed(self.world, float(loss), device=self.device)[0]
        if not math.isfinite(mean):
            raise RunFailure(
                NON_FINITE_LOSS,
                f"the loss became {mean} in step {state.step + 1}; lower training.learningRate, raise "
                "training.warmupRatio, or set training.precision to BF16 or FP32",
            )
        norm = self._update()
        state.step += 1
        tokens = sum(len(self.rows[index].input_ids) for index in batch)
        state.tokens += tokens
        state.last_loss = mean
        state.metrics.append(
            {"step": state.step, "loss": mean, "gradNorm": norm, "learningRate": learning_rate, "tokens": state.tokens}
            | {"tokensPerSecond": round(tokens / (time.perf_counter() - begun), 1), "time": round(time.time(), 3)}
        )

    def _seeded(self, chunks: dict[int, list[Row]]) -> Iterator[list[Row]]:
        """The micro batches; `chunks`: their rows, by the place of the first one in the effective batch.

        Nothing random outlives a micro batch, and what it draws depends on that place: a resumed run, on any node, and
        one with another number of processes draw what the first one would have drawn.
        """
        for place, rows in chunks.items():
            torch.manual_seed(random_seed(self.spec.training.seed, self.state.step, place))
            yield rows

    def learning_rate(self) -> float:
        training, plan = self.spec.training, self.plan
        factor = learning_rate_factor(
            training.scheduler,
            self.state.step,
            plan.steps,
            warmup_steps(plan.steps, training.warmup_ratio),
            restarts=max(1, math.ceil(plan.epoch(plan.steps))),
        )
        return training.learning_rate * factor

    @no_compiler()
    def _update(self) -> float:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        sum_gradients(self.world, parameters)
        self.scaler.unscale_(self.optimizer)
        bound = self.spec.training.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, bound))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise RunFailure(
                NON_FINITE_LOSS,
                f"the gradient became {norm} in step {self.state.step + 1}; lower training.learningRate, or set "
                "training.precision to FP32",
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if hasattr(self.model.base_model, "update_and_allocate"):
            self.model.base_model.update_and_allocate(self.state.step)  # AdaLoRA moves its ranks
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _stop_early(self, evaluate: Callable[[], float]) -> bool:
        """Evaluate when it is time; keep the best weights; True once `patience` evaluations were no better."""
        state, stopping = self.state, self.spec.training.early_stopping
        if stopping is None or (
            state.step % evaluation_interval(self.spec, self.plan) and state.step < self.plan.steps
        ):
            return False
        loss = evaluate()
        if math.isfinite(loss):
            state.eval_loss = state.metrics[-1]["evalLoss"] = loss
        if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_step, state.stale_evaluations = loss, state.step, 0
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        else:
            state.stale_evaluations += 1
        best = "none yet" if state.best_loss is None else f"{state.best_loss:.4f} in step {state.best_step}"
        log.info("evaluation: step %d loss %.4f, best %s", state.step, loss, best)
        return self._out_of_patience()

    def _out_of_patience(self) -> bool:
        """Whether early stopping has ended the run, perhaps before this attempt."""
        stopping = self.spec.training.early_stopping
        return stopping is not None and self.state.stale_evaluations >= stopping.patience

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Everything that the next step depends on."""
        remembered, numbers = optimizer_state(self.optimizer, self.parameters)
        self.state.optimizer, self.state.loss_scale = numbers, self.scaler.state_dict()
        method, self.state.method = allocator_state(self.model)
        trained = {name: parameter.data for name, parameter in self.parameters.items()}
        tensors = {"trainable": trained, "optimizer": remembered, "method": method}
        tensors |= {"initial": self.initial, "best": self.best, "reference": self.reference}
        return Snapshot(self.state, tensors)

    def resume(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot as if nothing had happened."""
        self.state = snapshot.state
        self._restore(snapshot.tensors["trainable"])
        restore_optimizer(self.optimizer, self.parameters, snapshot.tensors.get("optimizer", {}), self.state.optimizer)
        if self.state.loss_scale:
            self.scaler.load_state_dict(self.state.loss_scale)
        restore_allocator(self.model, snapshot.tensors.get("method", {}), self.state.method)
        self.best = snapshot.tensors.get("best", {})

    def _restore(self, tensors: Tensors) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])


def random_seed(seed: int, step: int, place: int) -> int:
    """Another random stream for each micro batch of each step."""
    return ((seed * 1_000_003 + step) * 65_537 + place) % 2**63


def evaluation_interval(spec: FineTuneSpec, plan: Plan) -> int:
    """Steps between the evaluations of early stopping: one per checkpoint, or ten in a run whose checkpoints go by
    time, because what is learned must not depend on how fast a machine is."""
    every = spec.checkpoint.every
    if isinstance(every, int):
        return every
    if every == "epoch":
        return max(1, math.ceil(plan.rows / plan.batch_size))
    return max(1, math.ceil(plan.steps / 10))


class CheckpointClock:
    """Whether `checkpoint.every` says that a checkpoint is due: by steps, epochs or time."""

    def __init__(self, every: int | str, plan: Plan, step: int) -> None:
        self.every, self.plan = every, plan
        self.last_epoch = math.floor(plan.epoch(step))
        self.last_time = time.monotonic()

    def __call__(self, step: int) -> bool:
        if isinstance(self.every, int):
            return step % self.every == 0
        if self.every == "epoch":
            epoch = math.floor(self.plan.epoch(step))
            due, self.last_epoch = epoch > self.last_epoch, epoch
            return due
        if time.monotonic() - self.last_time < seconds(self.every):
            return False
        self.last_time = time.monotonic()
        return True


@contextmanager
def neftune(model: Any, alpha: float | None) -> Iterator[None]:
    """Within it embeddings carry uniform noise of size alpha / sqrt(length x width), each sample by its own length."""
    if alpha is None:
        yield
        return

    def noisy(module: torch.nn.Module, inputs: object, embedded: torch.Tensor) -> torch.Tensor:
        if embedded.shape[0] == 1:
            sizes = torch.tensor(lengths_now(), device=embedded.device)
            lengths = torch.repeat_interleave(sizes, sizes)[None, :, None]
        else:
            lengths = torch.tensor(lengths_now(), device=embedded.device)[:, None, None]
        bound = alpha / (lengths * embedded.shape[-1]).sqrt()
        return embedded + (torch.rand_like(embedded) * 2 - 1) * bound.to(embedded.dtype)

    hook = model.get_input_embeddings().register_forward_hook(noisy)
    try:
        yield
    finally:
        hook.remove()


ALLOCATOR = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # AdaLoRA's memory of what mattered


def allocator_state(model: Any) -> tuple[Tensors, dict[str, Any]]:
    allocator = getattr(model.base_model, "rankallocator", None)
    if allocator is None:
        return {}, {}
    tensors = {f"{kind}/{name}": tensor for kind in ALLOCATOR for name, tensor in getattr(allocator, kind).items()}
    return tensors, {"rankPattern": model.peft_config["default"].rank_pattern}


def restore_allocator(model: Any, tensors: Tensors, numbers: dict[str, Any]) -> None:
    allocator = getattr(model.base_model, "rankallocator", None)
    if allocator is None:
        return
    for path, tensor in tensors.items():
        kind, _, name = path.partition("/")
        getattr(allocator, kind)[name] = tensor
    model.peft_config["default"].rank_pattern = numbers.get("rankPattern")
