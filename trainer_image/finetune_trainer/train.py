"""The train stage: base model and prepared rows in, a verified adapter out.

    python -m finetune_trainer train --spec spec.json

Downloads run while torch is imported. Everything conditional (quantization, method, objective, optimizer) is a function
that returns a thing; this file is the order in which they are used.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from finetune_trainer.failures import CUDA_OUT_OF_MEMORY, RunFailure
from finetune_trainer.inputs import copy_tokenizer, downloaded, start_download
from finetune_trainer.interruption import Sigterm
from finetune_trainer.page.story import Story
from finetune_trainer.report import Listener, Reporter
from finetune_trainer.results.outcome import (
    finished_result,
    folder,
    samples_key,
    write_failed_report,
    write_report,
    write_result,
    write_run,
    write_tasks,
)
from finetune_trainer.results.tracking.follow import Tracking
from finetune_trainer.runspec import Result, RunSpec, TrainResult
from finetune_trainer.stage import Interrupted, finish
from finetune_trainer.storage.store import Store

log = logging.getLogger(__name__)
WORK = Path(os.environ.get("FINETUNE_WORK", "/work"))


def main(run: RunSpec) -> Result | None:
    """Train, or find that it is done already; the Result is the first process's to tell.

    Raises: RunFailure, and Interrupted with a checkpoint saved.
    """
    if run.prepared is None:
        raise ValueError("a train Job needs the result of prepare in its run spec")
    reporter = Reporter(run)
    store = Store(run.storage, told=reporter.waits)
    reporter.loads()
    trained = finished_result(store, run) or train(run, store, listener=reporter)
    return Result(stage="train", job=run.job, run_id=run.prepared.run_id, trained=trained) if trained else None


def train(run: RunSpec, store: Store, work: Path = WORK, listener: Listener | None = None) -> TrainResult | None:
    """One attempt, from the newest checkpoint if there is one; report.html tells of it, however it ends.

    `listener` is told of progress in the operator's place. None in all processes but the first.
    """
    story = Story(run)
    tracking = Tracking(run, story, work)
    try:
        return attempt(run, store, work, story, listener or Reporter(run), tracking)
    except Interrupted:
        tracking.end("Interrupted")
        raise
    except Exception as error:
        if os.environ.get("RANK", "0") == "0":
            story.failure = str(error)
            story.tracking = tracking.end("Failed")
            write_failed_report(store, story, error)
        raise


def attempt(
    run: RunSpec, store: Store, work: Path, story: Story, listener: Listener, tracking: Tracking
) -> TrainResult | None:
    """What `train` does; `story` is kept up to date with it."""
    assert run.prepared
    spec, prepared, sigterm = run.spec, run.prepared, Sigterm()
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    inputs = start_download(prepared, store, work) if first_here else downloaded(prepared, work)

    started = time.monotonic()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from finetune_trainer.data.batches import Rows, batches, decoded_prompts
    from finetune_trainer.evaluation.evaluate import compare, evaluate, load_tokenizer, write_answers
    from finetune_trainer.memory.estimate import longest_row
    from finetune_trainer.memory.plan import make_plan
    from finetune_trainer.methods.initialization import initialize
    from finetune_trainer.objectives.objective import make_autocast, make_objective
    from finetune_trainer.objectives.reference import rows_used, set_references
    from finetune_trainer.progress import Progress, peak_memory
    from finetune_trainer.results import adapter
    from finetune_trainer.training import startup
    from finetune_trainer.training.checkpoint import Checkpoints
    from finetune_trainer.training.device import find_device, find_precision, use_gradient_checkpointing
    from finetune_trainer.training.distributed import (
        World,
        as_leader_says,
        find_world,
        first_on_node,
        share_start,
        summed,
    )
    from finetune_trainer.training.fit import Fit
    from finetune_trainer.training.layout import choose_layout
    from finetune_trainer.training.peers import joined
    from finetune_trainer.training.quantization import load_base_model
    from finetune_trainer.training.shards import Shards

    world = find_world(run)
    startup.import_libraries(world.size)
    log.info("start: imports took %.1f s", time.monotonic() - started)
    device = find_device(spec.resources.gpus, run.pretend_gpu, world.local_rank)

    def end(failure: RunFailure) -> None:
        os._exit(finish(Result.failed(run, failure.reason, failure.message), run))

    with joined(world, device, end), out_of_memory_is_told():
        precision = find_precision(spec, device)
        checkpoints = Checkpoints(store, folder(run), work / f"checkpoints-{world.local_rank}", spec.checkpoint.keep)
        snapshot = checkpoints.newest() if world.leads else None
        resumed = as_leader_says(world, snapshot.state.step if snapshot else 0, device)
        if resumed and not world.leads:
            snapshot = checkpoints.at(resumed)

        with first_on_node(world, device):
            inputs.model()
            written = world.local_rank > 0
            rows = Rows(inputs.dataset(), "train", work / "rows", written)
            held_out = (
                Rows(inputs.dataset(), "evaluation", work / "rows", written)
                if prepared.dataset.evaluation_samples
                else None
            )
        plan = make_plan(run, inputs.model(), rows, world, device)
        shards = Shards(world, device) if plan.shards > 1 else None
        base = load_base_model(inputs.model(), spec, precision, device, shards)
        if world.leads:
            listener.begins(plan.micro_batch)
        layout = choose_layout(base, spec)
        objective = make_objective(spec, layout, device, precision)
        if not shards:  # whose blocks are computed twice anyhow
            use_gradient_checkpointing(base, spec, plan.checkpointing)

        first = batches(rows, plan.micro_batch, layout, device)
        model, initial = initialize(base, spec, plan.steps, inputs.model(), first, snapshot, shards)
        splits = {"train": (rows, rows_used(plan, spec.training.seed))}
        if held_out:
            splits["evaluation"] = (held_out, list(range(len(held_out))))
        reference = set_references(model, initial, objective, splits, plan.micro_batch, world, device, snapshot)
        fit = Fit(spec, model, objective, rows, plan, world, device, precision.scaled, initial, reference)
        if snapshot:
            fit.resume(snapshot)
        share_start(world, list(fit.parameters.values()), initial.values(), device)
        story.metrics, story.total_steps, story.resumed_from = fit.state.metrics, plan.steps, fit.state.step or None
        story.read_dataset(inputs.dataset())

        def measure() -> dict[str, float]:
            return evaluate(model, objective, held_out, plan.micro_batch, world, device) if held_out else {}

        progress = Progress(fit, listener, tracking.now)

        def tell() -> None:
            if world.leads:
                progress.step()
                tracking.step()

        with sigterm.deferred():
            done = fit.run(checkpoints.save, tell, lambda: sigterm.received, lambda: measure()["loss"])
            checkpoints.wait()
            # A pod that comes back joins the others only when all have gone.
            told = summed(world, float(sigterm.received), device=device)[0]
        if not done or told or sigterm.received:  # a signal during the last step counts too: what follows can take long
            raise Interrupted(f"interrupted after step {fit.state.step}/{plan.steps}; its checkpoint is saved")

        tasks = None
        if prepared.dataset.tasks:
            from finetune_trainer.evaluation.tasks.ask import ask
            from finetune_trainer.evaluation.tasks.model import LoadedModel

            with first_on_node(world, device):
                asked = inputs.tasks()
            tokenizer = load_tokenizer(inputs.model(), inputs.dataset(), spec.base_model.trust_remote_code)
            tokens = plan.micro_batch * longest_row(spec)
            autocast = make_autocast(device, precision)
            # Blocks that are brought together by all are computed by one: generation takes each as long as it takes.
            sharing = World() if shards else world
            answering = LoadedModel(model, tokenizer, layout, autocast, tokens, sharing, device)
            if shards and not world.leads:
                shards.follow()
            else:
                with shards.led() if shards else nullcontext():
                    tasks = ask(asked, prepared.dataset.tasks.digest, model, initial, answering)
        evaluation = story.evaluation = compare(model, initial, measure, spec.evaluation.gates, objective.base, tasks)
        if not world.leads:
            if shards:
                shards.follow()
            return None
        story.tasks = write_tasks(store, run, tasks)
        with shards.led() if shards else nullcontext():
            place = inputs.model(), inputs.dataset()
            story.answers = write_answers(store, samples_key(run), model, initial, spec, *place)
        config = adapter.write_adapter(model, run, work / "adapter", initial)
        copy_tokenizer(inputs.model(), inputs.dataset(), work / "adapter")
        count = sum(parameter.numel() for parameter in fit.parameters.values())
        prompts = decoded_prompts(rows, inputs.model())
        status = story.adapter = adapter.publish(run, store, work / "adapter", config, count, evaluation, prompts)
        story.figures = {**progress.figures(), **peak_memory()}
        story.tracking = tracking.end("Finished")
        write_run(store, run, story.figures)
        result = progress.result(status, evaluation, write_report(store, story), story.tracking)
        return write_result(store, run, result)


@contextmanager
def out_of_memory_is_told() -> Iterator[None]:
    """Within it a GPU without memory left is a RunFailure, which the operator answers with smaller micro batches."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailure(CUDA_OUT_OF_MEMORY, str(error).partition("\n")[0]) from error
