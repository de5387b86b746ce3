"""report.html: one run on one page that needs nothing else, no network and no script.

Pure: a Story goes in, text comes out. Names, rows and answers are other people's text: everything is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from finetune_trainer.digest import hex_of
from finetune_trainer.page.story import Story
from finetune_trainer.page.style import CSS
from finetune_trainer.page.svg import Line, bar_chart, line_chart
from finetune_trainer.results.modelcard import base_name

Rows = Iterable[tuple[str, object]]

SHOWN_CHARACTERS = 6000  # of one sample or answer


def render(story: Story) -> str:
    """The whole page."""
    name = story.run.name
    sections = (
        _headline(story),
        _section("Training", _curves(story)),
        _section("Evaluation", _evaluation(story)),
        _section("Answers", _answers(story)),
        _section("Data", _data(story)),
        _section("What was trained", _inputs(story)),
        _section("Memory, time and cost", _resources(story)),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # Should anything slip through the escaping, the browser still runs and loads nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)} · fine-tuning report</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


# ---- the sections ----------------------------------------------------------------------------------------------------


def _headline(story: Story) -> str:
    spec, steps = story.run.spec, len(story.metrics)
    if story.failure:
        verdict, style = f"Failed: {story.failure}", "bad"
    elif story.evaluation is not None and story.evaluation.passed is False:
        verdict, style = "Gates not passed: this adapter is not served", "bad"
    elif story.evaluation is not None and story.evaluation.gates:
        verdict, style = "All gates passed", "good"
    else:
        verdict, style = "Trained", "good"
    tiles: Rows = [
        ("steps", f"{steps:,}/{story.total_steps:,}" if story.total_steps else f"{steps:,}"),
        ("training loss", _loss(story)),
        ("evaluation loss", _pair(story, "loss")),
        ("adapter", hex_of(story.adapter.digest)[:12] if story.adapter else None),
        ("first step after", _seconds(story.figures.get("secondsToFirstStep"))),
        ("tokens per second", _count(story.figures.get("tokensPerSecond"))),
    ]
    shown = "".join(f"<div><b>{_text(value)}</b><span>{escape(name)}</span></div>" for name, value in _known(tiles))
    where = f" · namespace {story.run.namespace}" if story.run.namespace else ""
    source = f"{spec.method.type}, {spec.objective.type}, on {base_name(spec)}{where}"
    return (
        f'<header><h1>{escape(story.run.name)}</h1><p class="sub">{_text(source)}</p>'
        f'<p class="verdict {style}">{_text(verdict)}</p><div class="tiles">{shown}</div></header>'
    )


def _curves(story: Story) -> str:
    lines = story.metrics
    if not lines:
        return ""
    evaluated = [(float(line["step"]), float(line["evalLoss"])) for line in lines if "evalLoss" in line]
    measured, best = story.evaluation, _best(story, evaluated)
    last = float(lines[-1]["step"])
    if measured is not None and "loss" in measured.adapter and not any(step == last for step, _ in evaluated):
        evaluated.append((last, measured.adapter["loss"]))
    base = measured.base.get("loss") if measured is not None else None
    loss = line_chart(
        "Loss",
        [Line("training", _series(lines, "loss"), "train"), Line("evaluation", evaluated, "eval", dots=True)],
        "optimizer step",
        "loss",
        ("base model on evaluation rows", base) if base is not None else None,
    )
    rate = line_chart(
        "Learning rate", [Line("rate", _series(lines, "learningRate"), "train")], "optimizer step", "", None
    )
    norm = line_chart("Gradient norm", [Line("norm", _series(lines, "gradNorm"), "train")], "optimizer step", "", None)
    resumed = f"<p>Went on from the checkpoint of step {story.resumed_from:,}.</p>" if story.resumed_from else ""
    return f'{loss}<div class="halves">{rate}{norm}</div>{best}{resumed}'


def _best(story: Story, evaluated: Sequence[tuple[float, float]]) -> str:
    """Which step's weights early stopping went back to: not those at the end of the curve."""
    if story.run.spec.training.early_stopping is None or story.adapter is None or not evaluated:
        return ""
    step, loss = min(evaluated, key=lambda point: point[1])
    ended = int(evaluated[-1][0])
    text = f"The adapter is that of step {step:,.0f}, which had the lowest evaluation loss, {_decimal(loss)}."
    return (
        f"<p>{text}"
        + (f" Early stopping ended the run after step {ended:,}." if ended < story.total_steps else "")
        + "</p>"
    )


def _evaluation(story: Story) -> str:
    measured = story.evaluation
    if measured is None or not measured.adapter:
        return ""
    held_out = {name: value for name, value in measured.adapter.items() if "/" not in name}
    metrics = "<h3>On held-out rows</h3>" + _grid(
        ("metric", "base model", "adapter"),
        ([name, _decimal(measured.base.get(name)), _decimal(value)] for name, value in held_out.items()),
    )
    metrics = (metrics if held_out else "") + _tasks(story)
    if not measured.gates:
        return f"{metrics}<p>No gates were set.</p>"
    gates = "".join(
        f'<li class="{"good" if gate.passed else "bad"}">{"passed" if gate.passed else "not passed"}: '
        f"{_text(gate.message or gate.metric)}</li>"
        for gate in measured.gates
    )
    return f'{metrics}<h3>Gates</h3><ul class="gates">{gates}</ul>'


def _tasks(story: Story) -> str:
    if not story.tasks:
        return ""
    return "<h3>Tasks of the lm-evaluation-harness, with standard errors</h3>" + _grid(
        ("task and metric", "questions", "base model", "adapter"),
        (
            [
                one["metric"] + (" (less is better)" if one["lower"] else ""),
                f"{one['questions']:,}",
                _with_error(one["base"], one["base_error"]),
                _with_error(one["adapter"], one["adapter_error"]),
            ]
            for one in story.tasks
        ),
    )


def _with_error(value: float, error: float | None) -> str:
    return _decimal(value) + (f" ± {error:.2g}" if error is not None else "")


def _answers(story: Story) -> str:
    return "".join(
        f'<article><p class="prompt" dir="auto">{_long(told["prompt"])}</p><div class="halves">'
        f"<div><h4>base model</h4>{_answer(told['base'])}</div>"
        f"<div><h4>adapter</h4>{_answer(told['adapter'])}</div></div></article>"
        for told in story.answers
    )


def _answer(text: str) -> str:
    return f'<pre dir="auto">{_long(text)}</pre>' if text else "<p><em>an empty answer</em></p>"


def _data(story: Story) -> str:
    prepared, about = story.run.prepared, story.about
    if prepared is None:
        return ""
    data, lengths = prepared.dataset, about.get("lengths") or {}
    facts = _facts(
        [
            ("samples", _count(data.samples)),
            ("held-out samples", _count(data.evaluation_samples)),
            ("tokens", _count(data.tokens)),
            ("of these learned", _count(about.get("learnedTokens"))),
            ("rows after packing" if about.get("packing") else "rows", _count(about.get("rows"))),
            ("truncated", _count(data.truncated)),
            ("dropped as too long", _count(data.dropped)),
            ("invalid rows skipped", _count(data.skipped)),
            ("duplicates", _count(data.duplicates)),
            ("held-out samples that are learned too", _count(about.get("overlap"))),
            ("format", data.format),
            ("lengths in tokens", _lengths(lengths)),
            ("digest", data.digest),
        ]
    )
    bars = about.get("histogram") or {}
    histogram = bar_chart("Lengths", bars.get("edges", []), bars.get("counts", []), "tokens in a sample", "samples")
    return facts + histogram + _sample(story.preview)


def _lengths(lengths: dict[str, int]) -> str:
    known = [name for name in ("p50", "p90", "p99", "max") if name in lengths]
    return ", ".join(f"{name} {lengths[name]:,}" for name in known)


def _sample(pieces: Sequence[dict[str, Any]]) -> str:
    """One rendered sample; what is learned is marked."""
    if not pieces:
        return ""
    text = "".join(
        f"<mark>{_long(piece['text'])}</mark>" if piece.get("learned") else _long(piece["text"]) for piece in pieces
    )
    title = "One sample as the model sees it; <mark>what is learned</mark> is marked"
    return f'<h3>{title}</h3><pre dir="auto">{text}</pre>'


def _inputs(story: Story) -> str:
    spec, prepared = story.run.spec, story.run.prepared
    if prepared is None:
        return ""
    training, method = spec.training, spec.method
    quantization = method.quantization.type
    return _facts(
        [
            ("base model", base_name(spec)),
            ("revision", prepared.base_model.revision),
            ("base digest", prepared.base_model.digest),
            ("parameters", _count(prepared.base_model.parameters)),
            ("trained parameters", _count(story.adapter.trainable_parameters) if story.adapter else None),
            ("method", method.type + (f" on {quantization} weights" if quantization != "None" else "")),
            ("rank", story.adapter.rank if story.adapter and story.adapter.rank else None),
            ("objective", spec.objective.type),
            ("batch", f"{training.batch_size} rows a step, at most {story.figures.get('microBatch', '?')} at once"),
            ("longest sample", f"{story.about.get('maxLength', training.max_length):,} tokens"),
            ("optimizer", f"{training.optimizer}, {training.scheduler} from {training.learning_rate:g}"),
            ("seed", training.seed),
            ("run", prepared.run_id),
            *(
                (f"run in {one.name}", f"{one.url} ({one.message})" if one.message else one.url)
                for one in story.tracking
            ),
            ("trainer image", story.run.trainer_image),
            ("adapter digest", story.adapter.digest if story.adapter else None),
            ("adapter", story.adapter.uri if story.adapter else None),
            ("adapter size", _bytes(story.adapter.size_bytes) if story.adapter else None),
        ]
    )


def _resources(story: Story) -> str:
    spec, figures = story.run.spec, story.figures
    estimate = story.run.prepared.estimate if story.run.prepared else None
    memory = estimate.gpu_memory if estimate else None
    gpus, shards = spec.resources.gpus * spec.resources.nodes, int(figures.get("shards") or 1)
    hours = gpus * float(figures.get("processSeconds") or 0) / 3600
    price = spec.budget.price_per_gpu_hour if spec.budget else None
    facts = _facts(
        [
            ("estimated memory of a GPU", f"{memory.expected} ({memory.low} to {memory.high})" if memory else None),
            ("measured peak of a GPU", _bytes(figures.get("gpuBytes"))),
            ("measured peak of the host", _bytes(figures.get("hostBytes"))),
            ("base model", f"shared out over {shards} processes" if shards > 1 else None),
            ("GPUs", gpus or "none: trained on the CPU"),
            ("time from start to first step", _seconds(figures.get("secondsToFirstStep"))),
            ("time in training", _seconds(figures.get("trainSeconds"))),
            ("time of this attempt", _seconds(figures.get("processSeconds"))),
            ("GPU-hours of this attempt", f"{hours:.3f}" if hours else None),
            ("cost of this attempt", _money(hours * price) if hours and price is not None else None),
            ("attempt", f"{story.run.attempt}, Job {story.run.job}"),
        ]
    )
    note = "<p>Earlier attempts are in the FineTune's status.cost.</p>" if story.run.attempt > 1 else ""
    return facts + note


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _facts(rows: Rows) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{_text(value)}</td></tr>" for name, value in _known(rows))
    return f'<table class="facts">{body}</table>'


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="grid"><tr>{first}</tr>{body}</table>'


def _known(rows: Rows) -> list[tuple[str, object]]:
    return [(name, value) for name, value in rows if value not in (None, "")]


def _text(value: object) -> str:
    return escape(str(value))


def _long(text: str) -> str:
    return _text(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …")


def _series(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]


def _loss(story: Story) -> str | None:
    return _decimal(story.metrics[-1].get("loss")) if story.metrics else None


def _pair(story: Story, metric: str) -> str | None:
    measured = story.evaluation
    if measured is None or metric not in measured.adapter:
        return None
    base = measured.base.get(metric)
    value = _decimal(measured.adapter[metric])
    return value if base is None else f"{_decimal(base)} → {value}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _seconds(value: float | None) -> str | None:
    if value is None:
        return None
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.2f} h"


def _money(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.4f}"


def _bytes(value: float | None) -> str | None:
    if value is None:
        return None
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 2**10:.1f} KiB"
