"""Every rule of the FineTune CRD against the real API server: one object that breaks it, one that keeps it."""

from typing import Any

import pytest

from finetune_operator.api import FineTune
from finetune_operator.api.unsupported import NOT_SUPPORTED_YET

from .apiserver import Client, Object
from .crd_cases import EVERYTHING_GROUP, Case, Changes, causes, changed, rule_messages

MINIMAL: Object = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTune",
    "metadata": {"name": "support-bot", "namespace": "default"},
    "spec": {
        "baseModel": {"s3": {"uri": "s3://models/tiny-llama"}},
        "dataset": {"train": {"s3": {"uri": "s3://datasets/support-bot/train.jsonl"}}},
    },
}
ONE_FILE = {"s3": {"uri": "s3://datasets/support-bot/train.jsonl"}}
SHA256 = "0" * 64
HELD_OUT = {"dataset.evaluation": {"fraction": 0.05}}


def url(address: str) -> Changes:
    return {"dataset.train": {"http": {"url": address, "sha256": SHA256}}}


FORBIDDEN_URL = Case(
    "url: must not point to the node itself, to a metadata service or to the Kubernetes API; use the address of the "
    "server that has the file",
    at="spec.dataset.train.http.url",
    bad=url("http://169.254.169.254/latest/meta-data/"),
    good=url("https://datasets.example.com/train.jsonl.gz"),
)

FORBIDDEN_URLS = [
    "http://localhost/train.jsonl",
    "http://LOCALHOST:8080/train.jsonl",
    "http://foo.localhost/train.jsonl",
    "http://127.0.0.1:9000/train.jsonl",
    "http://127.1/train.jsonl",
    "http://2130706433/train.jsonl",
    "http://0x7f000001/train.jsonl",
    "http://0177.0.0.1/train.jsonl",
    "http://0.0.0.0/train.jsonl",
    "http://[::1]:8080/train.jsonl",
    "http://[::]/train.jsonl",
    "http://[::ffff:169.254.169.254]/train.jsonl",
    "http://[fe80::1]/train.jsonl",
    "http://[fd00:ec2::254]/train.jsonl",
    "http://169.254.169.254",
    "http://169.254.169.254?x",
    "http://metadata/computeMetadata/v1/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "https://kubernetes/api",
    "https://kubernetes.default.svc/api",
    "https://kubernetes.default.svc.cluster.local./api",
]
ALLOWED_URLS = [
    "https://datasets.example.com/train.jsonl.gz",
    "http://minio.finetune-system:9000/datasets/train.jsonl",
    "http://10.0.0.12:8080/train.csv",
    "http://192.168.1.10/train.parquet",
    "http://[2001:db8::1]/train.jsonl",
    "https://localhost.example.com/train.jsonl",
    "https://my-metadata.example.com/train.jsonl?raw=true",
    "https://example.com/127.0.0.1/train.jsonl",
]

NAME_MESSAGE = (
    "metadata.name: at most 40 characters and no dots, because Jobs and pods are named after it; choose a shorter name"
)

CASES = [
    Case(
        NAME_MESSAGE,
        at="<nil>",
        bad={"metadata.name": "s" * 41},
        good={"metadata.name": "s" * 40},
    ),
    Case(
        NAME_MESSAGE,
        at="<nil>",
        bad={"metadata.name": "support.bot"},
        good={"metadata.name": "support-bot"},
    ),
    # baseModel and dataset
    Case(
        "give exactly one of huggingFace, s3 and persistentVolumeClaim",
        at="spec.baseModel",
        bad={"baseModel.huggingFace": {"repo": "acme/tiny"}},
        good={"baseModel": {"huggingFace": {"repo": "acme/tiny"}}},
    ),
    Case(
        "give exactly one of huggingFace, s3 and persistentVolumeClaim",
        at="spec.baseModel",
        bad={"baseModel": {"trustRemoteCode": True}},
        good={"baseModel": {"persistentVolumeClaim": {"claimName": "models"}, "trustRemoteCode": True}},
    ),
    Case(
        "give exactly one of huggingFace, s3, persistentVolumeClaim, configMap and http",
        at="spec.dataset.train",
        bad={"dataset.train.configMap": {"name": "rows", "key": "train.jsonl"}},
        good={"dataset.train": {"configMap": {"name": "rows", "key": "train.jsonl"}}},
    ),
    Case(
        "give exactly one of fraction, huggingFace, s3, persistentVolumeClaim, configMap and http",
        at="spec.dataset.evaluation",
        bad={"dataset.evaluation": {"fraction": 0.1, **ONE_FILE}},
        good={"dataset.evaluation": ONE_FILE},
    ),
    Case(
        "give exactly one of fraction, huggingFace, s3, persistentVolumeClaim, configMap and http",
        at="spec.dataset.evaluation",
        bad={"dataset.evaluation": {}},
        good={"dataset.evaluation": {"fraction": 0.1}},
    ),
    FORBIDDEN_URL,
    *(
        Case(
            f"columns: format {name} has the columns {known}; remove the others or change format",
            at="spec.dataset.columns",
            bad={"dataset.format": name, "dataset.columns": {wrong: "x"}, "objective.type": objective},
            good={"dataset.format": name, "dataset.columns": {right: "x"}, "objective.type": objective},
        )
        for name, known, wrong, right, objective in [
            ("Text", "text, system", "messages", "text", "SFT"),
            ("Messages", "messages, system", "prompt", "messages", "SFT"),
            ("PromptCompletion", "prompt, completion, system", "chosen", "system", "SFT"),
            ("Alpaca", "instruction, input, output, system", "completion", "input", "SFT"),
            ("ShareGPT", "conversations, system", "messages", "conversations", "SFT"),
            ("Preference", "prompt, chosen, rejected, system", "label", "rejected", "DPO"),
            ("UnpairedPreference", "prompt, completion, label, system", "rejected", "label", "KTO"),
        ]
    ),
    # objective
    Case(
        "beta: only DPO, KTO and ORPO have it; remove it",
        at="spec.objective.beta",
        bad={"objective": {"type": "SFT", "beta": 0.1}},
        good={"objective": {"type": "DPO", "beta": 0.1}},
    ),
    *(
        Case(
            f"{field}: only KTO has it; remove it",
            at=f"spec.objective.{field}",
            bad={"objective": {"type": "DPO", field: 1.3}},
            good={"objective": {"type": "KTO", field: 1.3}},
        )
        for field in ("desirableWeight", "undesirableWeight")
    ),
    Case(
        "dataset.format: DPO, ORPO and Reward learn from Preference rows; use Preference or Auto",
        at="spec.dataset.format",
        bad={"objective.type": "DPO", "dataset.format": "Messages"},
        good={"objective.type": "DPO", "dataset.format": "Preference"},
    ),
    Case(
        "dataset.format: KTO learns from UnpairedPreference rows; use UnpairedPreference or Auto",
        at="spec.dataset.format",
        bad={"objective.type": "KTO", "dataset.format": "Preference"},
        good={"objective.type": "KTO", "dataset.format": "UnpairedPreference"},
    ),
    Case(
        "dataset.format: SFT learns from single answers; change objective.type to DPO, KTO, ORPO or Reward",
        at="spec.dataset.format",
        bad={"dataset.format": "Preference"},
        good={"dataset.format": "Alpaca"},
    ),
    Case(
        "objective.type: virtual tokens are trained with SFT only; use method.type QLoRA or LoRA",
        at="spec.objective.type",
        bad={"objective.type": "DPO", "method.type": "PromptTuning"},
        good={"objective.type": "SFT", "method.type": "PromptTuning"},
    ),
    # method
    Case(
        "method.type: AdaLoRA cannot be trained with objective Reward; use QLoRA or LoRA",
        at="spec.method.type",
        bad={"objective.type": "Reward", "method.type": "AdaLoRA"},
        good={"objective.type": "Reward", "method.type": "LoRA"},
    ),
    Case(
        "lora: only QLoRA and LoRA have it; remove it or change type",
        at="spec.method.lora",
        bad={"method": {"type": "IA3", "lora": {"rank": 8}}},
        good={"method": {"type": "LoRA", "lora": {"rank": 8}}},
    ),
    Case(
        "adaLora: only AdaLoRA has it; remove it or change type",
        at="spec.method.adaLora",
        bad={"method.adaLora": {"targetRank": 4}},
        good={"method": {"type": "AdaLoRA", "adaLora": {"targetRank": 4}}},
    ),
    Case(
        "ia3: only IA3 has it; remove it or change type",
        at="spec.method.ia3",
        bad={"method.ia3": {"targetModules": ["k_proj"]}},
        good={"method": {"type": "IA3", "ia3": {"targetModules": ["k_proj"]}}},
    ),
    Case(
        "virtualTokens: only PrefixTuning, PromptTuning and PTuning have it; remove it or change type",
        at="spec.method.virtualTokens",
        bad={"method.virtualTokens": {"count": 8}},
        good={"method": {"type": "PTuning", "virtualTokens": {"count": 8}}},
    ),
    Case(
        "virtualTokens.initText: only PromptTuning starts from a text; remove it",
        at="spec.method.virtualTokens.initText",
        bad={"method": {"type": "PTuning", "virtualTokens": {"initText": "Answer:"}}},
        good={"method": {"type": "PromptTuning", "virtualTokens": {"initText": "Answer:"}}},
    ),
    Case(
        "virtualTokens.projection: only PrefixTuning has one; remove it",
        at="spec.method.virtualTokens.projection",
        bad={"method": {"type": "PromptTuning", "virtualTokens": {"projection": True}}},
        good={"method": {"type": "PrefixTuning", "virtualTokens": {"projection": True}}},
    ),
    Case(
        "targetModules: give module names, or all-linear alone, or exactly one regular expression",
        at="spec.method.lora.targetModules",
        bad={"method.lora.targetModules": ["all-linear", "q_proj"]},
        good={"method.lora.targetModules": ["q_proj", "mlp.down_proj"]},
    ),
    Case(
        "targetModules: give module names, or all-linear alone, or exactly one regular expression",
        at="spec.method.adaLora.targetModules",
        bad={"method": {"type": "AdaLoRA", "adaLora": {"targetModules": [r".*\.[qv]_proj", "k_proj"]}}},
        good={"method": {"type": "AdaLoRA", "adaLora": {"targetModules": [r".*\.[qv]_proj"]}}},
    ),
    Case(
        "useDora: DoRA needs an adapter that starts at zero; use initialization Default, Gaussian or EVA",
        at="spec.method.lora.useDora",
        bad={"method": {"type": "LoRA", "lora": {"useDora": True, "initialization": "PiSSA"}}},
        good={"method": {"type": "LoRA", "lora": {"useDora": True, "initialization": "EVA"}}},
    ),
    Case(
        "rankPattern: EVA shares the ranks out among the layers that get the same input; remove it, or use "
        "initialization Default",
        at="spec.method.lora.rankPattern",
        bad={"method.lora": {"initialization": "EVA", "rankPattern": {"q_proj": 8}}},
        good={"method.lora": {"initialization": "EVA", "alphaPattern": {"q_proj": 8}}},
    ),
    Case(
        "layersToTransform: a regular expression in targetModules names its layers itself; write them into it, or give "
        "names",
        at="spec.method.lora.layersToTransform",
        bad={"method.lora": {"targetModules": [r".*\.[qv]_proj"], "layersToTransform": [0]}},
        good={"method.lora": {"targetModules": ["all-linear"], "layersToTransform": [0]}},
    ),
    Case(
        "lora.useDora: DoRA reads the base weights in every step, which INT8 layers do not give; use method.type QLoRA, "
        "or quantization.type None",
        at="spec.method.lora.useDora",
        bad={"method": {"type": "LoRA", "lora": {"useDora": True}, "quantization": {"type": "INT8"}}},
        good={"method": {"type": "QLoRA", "lora": {"useDora": True}, "quantization": {"type": "FP4"}}},
    ),
    Case(
        "targetModules: give module names, or all-linear alone, or exactly one regular expression",
        at="spec.method.ia3.targetModules",
        bad={"method": {"type": "IA3", "ia3": {"targetModules": ["k_proj", "all-linear"]}}},
        good={"method": {"type": "IA3", "ia3": {"targetModules": ["all-linear"]}}},
    ),
    Case(
        "feedforwardModules: only targets can be scaled at their input; name these in targetModules too",
        at="spec.method.ia3.feedforwardModules",
        bad={"method": {"type": "IA3", "ia3": {"targetModules": ["k_proj"], "feedforwardModules": ["down_proj"]}}},
        good={"method": {"type": "IA3", "ia3": {"targetModules": ["down_proj"], "feedforwardModules": ["down_proj"]}}},
    ),
    Case(
        "feedforwardModules: only targets can be scaled at their input; name these in targetModules too",
        at="spec.method.ia3.feedforwardModules",
        bad={"method": {"type": "IA3", "ia3": {"feedforwardModules": ["down_proj"]}}},
        good={
            "method": {"type": "IA3", "ia3": {"targetModules": [".*down_proj"], "feedforwardModules": ["down_proj"]}}
        },
    ),
    Case(
        "quantization.type: QLoRA trains on 4-bit weights; use NF4 or FP4, or method.type LoRA",
        at="spec.method.quantization.type",
        bad={"method": {"type": "QLoRA", "quantization": {"type": "INT8"}}},
        good={"method": {"type": "QLoRA", "quantization": {"type": "FP4"}}},
    ),
    Case(
        "quantization.type: LoRA on 4-bit weights is QLoRA; use method.type QLoRA, or INT8 or None",
        at="spec.method.quantization.type",
        bad={"method": {"type": "LoRA", "quantization": {"type": "NF4"}}},
        good={"method": {"type": "LoRA", "quantization": {"type": "INT8"}}},
    ),
    Case(
        "lora.initialization: PiSSA and OLoRA change the base weights and cannot change quantized ones; use "
        "method.type LoRA without quantization",
        at="spec.method.lora.initialization",
        bad={"method.lora.initialization": "PiSSA"},
        good={"method": {"type": "LoRA", "lora": {"initialization": "PiSSA"}}},
    ),
    Case(
        "lora.initialization: LoftQ makes up for 4-bit quantization; use it with method.type QLoRA",
        at="spec.method.lora.initialization",
        bad={"method": {"type": "LoRA", "lora": {"initialization": "LoftQ"}}},
        good={"method": {"type": "QLoRA", "lora": {"initialization": "LoftQ"}}},
    ),
    Case(
        "targetRank: ranks are only ever cut; set it to at most initialRank",
        at="spec.method.adaLora.targetRank",
        bad={"method": {"type": "AdaLoRA", "adaLora": {"initialRank": 8, "targetRank": 9}}},
        good={"method": {"type": "AdaLoRA", "adaLora": {"initialRank": 8, "targetRank": 8}}},
    ),
    Case(
        "finalRatio: warmupRatio and finalRatio leave no step to cut ranks in; their sum must be below 1",
        at="spec.method.adaLora.finalRatio",
        bad={"method": {"type": "AdaLoRA", "adaLora": {"warmupRatio": 0.5, "finalRatio": 0.5}}},
        good={"method": {"type": "AdaLoRA", "adaLora": {"warmupRatio": 0.5, "finalRatio": 0.4}}},
    ),
    # training and checkpoint
    Case(
        "maxSteps: give epochs or maxSteps, not both",
        at="spec.training.maxSteps",
        bad={"training": {"epochs": 3, "maxSteps": 100}},
        good={"training": {"maxSteps": 100}},
    ),
    Case(
        "training.packing: only SFT samples can be packed; use Auto or Disabled",
        at="spec.training.packing",
        bad={"objective.type": "DPO", "training.packing": "Enabled"},
        good={"objective.type": "DPO", "training.packing": "Disabled"},
    ),
    Case(
        "training.lossOn: only SFT can learn prompts; remove it",
        at="spec.training.lossOn",
        bad={"objective.type": "DPO", "training.lossOn": "All"},
        good={"objective.type": "SFT", "training.lossOn": "All"},
    ),
    Case(
        "training.batchSize: must be a multiple of microBatchSize x GPUs x nodes, so that it is exactly the effective "
        "batch; change one of them",
        at="spec.training.batchSize",
        bad={"training": {"batchSize": 16, "microBatchSize": 3}},
        good={"training": {"batchSize": 16, "microBatchSize": 4}},
    ),
    Case(
        "training.batchSize: must be a multiple of microBatchSize x GPUs x nodes, so that it is exactly the effective "
        "batch; change one of them",
        at="spec.training.batchSize",
        bad={"training": {"batchSize": 16}, "resources": {"gpus": 3, "nodes": 2}},
        good={"training": {"batchSize": 16}, "resources": {"gpus": 4, "nodes": 2}},
    ),
    Case(
        "training.gradientCheckpointing: PrefixTuning keeps its vectors in the cache, which checkpointing switches off; "
        "use Auto or Disabled",
        at="spec.training.gradientCheckpointing",
        bad={"method": {"type": "PrefixTuning"}, "training.gradientCheckpointing": "Enabled"},
        good={"method": {"type": "PromptTuning"}, "training.gradientCheckpointing": "Enabled"},
    ),
    Case(
        "training.precision: FP16 needs a GPU; use Auto",
        at="spec.training.precision",
        bad={"training.precision": "FP16", "resources.gpus": 0},
        good={"training.precision": "BF16", "resources.gpus": 0},
    ),
    Case(
        "dataset.evaluation: training.earlyStopping needs held-out rows; set it, e.g. to {fraction: 0.05}",
        at="spec.dataset.evaluation",
        bad={"training.earlyStopping": {"patience": 2}},
        good={"training.earlyStopping": {"patience": 2}, **HELD_OUT},
    ),
    Case(
        "every: at least 10s, or a number of steps, or epoch",
        at="spec.checkpoint.every",
        bad={"checkpoint.every": "9s"},
        good={"checkpoint.every": "10s"},
    ),
    # evaluation
    Case(
        "a gate needs a bar: set max, min or betterThanBase",
        at="spec.evaluation.gates[0]",
        bad={**HELD_OUT, "evaluation.gates": [{"metric": "loss"}]},
        good={**HELD_OUT, "evaluation.gates": [{"metric": "loss", "betterThanBase": True}]},
    ),
    Case(
        "min: no value passes; min must be at most max",
        at="spec.evaluation.gates[0].min",
        bad={**HELD_OUT, "evaluation.gates": [{"metric": "token_accuracy", "min": 0.9, "max": 0.5}]},
        good={**HELD_OUT, "evaluation.gates": [{"metric": "token_accuracy", "min": 0.5, "max": 0.9}]},
    ),
    Case(
        "gates: the task of a <task>/<metric> gate must be one of evaluation.tasks; add it there",
        at="spec.evaluation.gates",
        bad={"evaluation": {"gates": [{"metric": "hellaswag/acc_norm", "min": 0.5}]}},
        good={
            "evaluation": {"gates": [{"metric": "hellaswag/acc_norm", "min": 0.5}], "tasks": [{"name": "hellaswag"}]}
        },
    ),
    Case(
        "dataset.evaluation: gates need held-out rows, unless they are about a task; set it, e.g. to {fraction: 0.05}",
        at="spec.dataset.evaluation",
        bad={"evaluation.gates": [{"metric": "perplexity", "max": 5}]},
        good={"evaluation.gates": [{"metric": "perplexity", "max": 5}], **HELD_OUT},
    ),
    Case(
        "evaluation.gates: SFT has the metrics loss, perplexity and token_accuracy; use one of them",
        at="spec.evaluation.gates",
        bad={**HELD_OUT, "evaluation.gates": [{"metric": "reward_accuracy", "min": 0.6}]},
        good={**HELD_OUT, "evaluation.gates": [{"metric": "token_accuracy", "min": 0.6}]},
    ),
    Case(
        "evaluation.gates: DPO, KTO, ORPO and Reward have the metrics loss, reward_accuracy and reward_margin; use one "
        "of them",
        at="spec.evaluation.gates",
        bad={**HELD_OUT, "objective.type": "DPO", "evaluation.gates": [{"metric": "perplexity", "max": 5}]},
        good={
            **HELD_OUT,
            "objective.type": "DPO",
            "evaluation.gates": [
                {"metric": "reward_accuracy", "min": 0.6, "betterThanBase": True},
                {"metric": "reward_margin", "min": 0},
                {"metric": "loss", "max": 0.7},
            ],
        },
    ),
    Case(
        "evaluation.gates: the base model has no score that a Reward model could be better than; use max or min",
        at="spec.evaluation.gates",
        bad={**HELD_OUT, "objective.type": "Reward", "evaluation.gates": [{"metric": "loss", "betterThanBase": True}]},
        good={**HELD_OUT, "objective.type": "Reward", "evaluation.gates": [{"metric": "reward_accuracy", "min": 0.6}]},
    ),
    Case(
        "evaluation: a Reward model scores answers and writes none; remove samples and tasks",
        at="spec.evaluation",
        bad={"objective.type": "Reward", "evaluation.samples": ["What is a pod?"]},
        good={"objective.type": "DPO", "evaluation.samples": ["What is a pod?"]},
    ),
    # where and with what it runs
    Case(
        "output.exports: GGUF has no head for the score of a Reward model; remove GGUF, or use Merged",
        at="spec.output.exports",
        bad={"objective.type": "Reward", "output.exports": ["GGUF"]},
        good={"objective.type": "Reward", "output.exports": ["Merged"]},
    ),
    Case(
        "training.batchSize: KTO estimates from each batch how far the model is from the base model; use 2 or more",
        at="spec.training.batchSize",
        bad={"objective.type": "KTO", "training.batchSize": 1},
        good={"objective.type": "KTO", "training.batchSize": 2},
    ),
    Case(
        "output.exports: virtual tokens cannot be merged into the weights; remove exports or change method.type",
        at="spec.output.exports",
        bad={"method.type": "PrefixTuning", "output.exports": ["Merged"]},
        good={"method.type": "LoRA", "output.exports": ["Merged"]},
    ),
    Case(
        "mergedPrecision: only exports have it; add Merged or GGUF to exports, or remove it",
        at="spec.output.mergedPrecision",
        bad={"output": {"mergedPrecision": "FP16"}},
        good={"output": {"mergedPrecision": "FP16", "exports": ["GGUF"]}},
    ),
    Case(
        "hub.content: there is no merged model to push; add Merged to exports",
        at="spec.output.hub.content",
        bad={"output.hub": {"repo": "acme/bot", "content": "Merged", "tokenSecretRef": {"name": "hub"}}},
        good={"output.hub": {"repo": "acme/bot", "tokenSecretRef": {"name": "hub"}}},
    ),
    Case(
        "uri: no user name or password in it; use credentialsSecretRef",
        at="spec.tracking.mlflow.uri",
        bad={"tracking": {"mlflow": {"uri": "https://me:secret@mlflow.example.com"}}},
        good={"tracking": {"mlflow": {"uri": "https://mlflow.example.com/ml", "experiment": "Support bots"}}},
    ),
    Case(
        "baseUrl: no user name or password in it; use apiKeySecretRef",
        at="spec.tracking.wandb.baseUrl",
        bad={"tracking": {"wandb": {"baseUrl": "https://key@wandb.example.com", "apiKeySecretRef": {"name": "w"}}}},
        good={"tracking": {"wandb": {"project": "bots", "apiKeySecretRef": {"name": "w", "key": "api-key"}}}},
    ),
    Case(
        "activeDeadline: at least 1m",
        at="spec.activeDeadline",
        bad={"activeDeadline": "59s"},
        good={"activeDeadline": "1h30m"},
    ),
    Case(
        "a budget needs a bound: set maxGpuHours or maxCost",
        at="spec.budget",
        bad={"budget": {"pricePerGpuHour": 2}},
        good={"budget": {"pricePerGpuHour": 2, "maxCost": 100}},
    ),
    *(
        Case(
            f"{field}: finetune.dev/, kueue.x-k8s.io/ and app.kubernetes.io/managed-by are the operator's; remove them",
            at=f"spec.podTemplate.{field}",
            bad={f"podTemplate.{field}": {key: "x"}},
            good={f"podTemplate.{field}": {"team": "support", "example.com/cost-centre": "42"}},
        )
        for field, key in [
            ("labels", "finetune.dev/stage"),
            ("labels", "app.kubernetes.io/managed-by"),
            ("annotations", "kueue.x-k8s.io/queue-name"),
        ]
    ),
    *(
        Case(
            f"{field}: a key must look like app or example.com/app",
            at=f"spec.podTemplate.{field}",
            bad={f"podTemplate.{field}": {"not a key": "x"}},
            good={f"podTemplate.{field}": {"example.com/key": "x"}},
        )
        for field in ("labels", "annotations", "nodeSelector")
    ),
    Case(
        "labels: a key must look like app or example.com/app",
        at="spec.podTemplate.labels",
        bad={"podTemplate.labels": {"x" * 64: "x"}},
        good={"podTemplate.labels": {"x" * 63: "x"}},
    ),
    Case(
        "key: operator Equal needs a key; give one or use operator Exists",
        at="spec.podTemplate.tolerations[0].key",
        bad={"podTemplate.tolerations": [{"value": "x"}]},
        good={"podTemplate.tolerations": [{"key": "nvidia.com/gpu", "value": "x"}, {"operator": "Exists"}]},
    ),
    Case(
        "value: operator Exists compares no value; remove it or use operator Equal",
        at="spec.podTemplate.tolerations[0].value",
        bad={"podTemplate.tolerations": [{"key": "gpu", "operator": "Exists", "value": "x"}]},
        good={"podTemplate.tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]},
    ),
    Case(
        "valueFrom: give value or valueFrom, not both",
        at="spec.podTemplate.env[0].valueFrom",
        bad={
            "podTemplate.env": [{"name": "A", "value": "x", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]
        },
        good={"podTemplate.env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]},
    ),
    Case(
        "give exactly one of secretKeyRef and configMapKeyRef",
        at="spec.podTemplate.env[0].valueFrom",
        bad={"podTemplate.env": [{"name": "A", "valueFrom": {}}]},
        good={"podTemplate.env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "s", "key": "k"}}}]},
    ),
    Case(
        "name: the operator sets this variable itself; remove it",
        at="spec.podTemplate.env[0].name",
        bad={"podTemplate.env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]},
        good={"podTemplate.env": [{"name": "WANDB_PROJECT", "value": "x"}]},
    ),
]

# What uses each field that is not supported yet, or was not once. An example whose line is gone from NOT_SUPPORTED_YET
# must be accepted.
NOT_SUPPORTED_EXAMPLES: dict[str, Changes] = {
    "dataset.format": {"dataset.format": "UnpairedPreference", "objective.type": "KTO"},
    "objective.type": {"objective.type": "DPO"},
    "method.type": {"method.type": "IA3"},
    "method.quantization.type": {"method.quantization.type": "FP4"},
    "method.lora.modulesToSave": {"method.lora.modulesToSave": ["lm_head"]},
    "method.lora.bias": {"method.lora.bias": "LoraOnly"},
    "method.lora.useDora": {"method.lora.useDora": True},
    "method.lora.initialization": {"method.lora.initialization": "EVA"},
    "method.lora.rankPattern": {"method.lora.rankPattern": {"q_proj": 8}},
    "method.lora.alphaPattern": {"method.lora.alphaPattern": {"q_proj": 8}},
    "method.lora.loraPlusRatio": {"method.lora.loraPlusRatio": 16},
    "training.earlyStopping": {"training.earlyStopping": {}, **HELD_OUT},
    "checkpoint.every": {"checkpoint.every": "epoch"},
    "evaluation.tasks": {"evaluation.tasks": [{"name": "hellaswag"}]},
    "output.exports": {"output.exports": ["GGUF"]},
    "output.hub": {"output.hub": {"repo": "acme/bot", "tokenSecretRef": {"name": "hub"}}},
    "budget": {"budget": {"maxGpuHours": 10}},
}


def test_the_minimal_object_is_accepted(kube: Client) -> None:
    assert causes(kube, MINIMAL) == set()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_object_that_breaks_a_rule_is_refused_with_its_message(kube: Client, case: Case) -> None:
    refused = causes(kube, changed(MINIMAL, case.bad, EVERYTHING_GROUP))
    assert any(field == case.at and message.endswith(f": {case.message}") for field, message in refused), refused


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_object_that_keeps_a_rule_is_accepted(kube: Client, case: Case) -> None:
    assert causes(kube, changed(MINIMAL, case.good, EVERYTHING_GROUP)) == set()


def test_every_rule_of_the_crd_has_a_case() -> None:
    assert rule_messages("FineTune") == {case.message for case in CASES}


@pytest.mark.parametrize("address", FORBIDDEN_URLS)
def test_a_dataset_url_to_the_node_or_a_metadata_service_is_refused(kube: Client, address: str) -> None:
    refused = causes(kube, changed(MINIMAL, url(address)))
    assert {field for field, _ in refused} == {FORBIDDEN_URL.at}


@pytest.mark.parametrize("address", ALLOWED_URLS)
def test_a_dataset_url_to_another_server_is_accepted(kube: Client, address: str) -> None:
    assert causes(kube, changed(MINIMAL, url(address))) == set()


@pytest.mark.parametrize("path", NOT_SUPPORTED_EXAMPLES)
def test_what_is_not_supported_yet_is_refused_by_name_and_the_rest_is_accepted(kube: Client, path: str) -> None:
    obj = changed(MINIMAL, NOT_SUPPORTED_EXAMPLES[path])
    refused = causes(kube, obj)
    expected = (f"spec.{path}", f"{path}: not supported yet")
    if path in NOT_SUPPORTED_YET["FineTune"]:
        assert any((field, message.removeprefix("Forbidden: ")) == expected for field, message in refused), refused
    else:
        assert not any(message.endswith(expected[1]) for _, message in refused), refused


def test_every_field_that_is_not_supported_yet_has_an_example() -> None:
    assert set(NOT_SUPPORTED_YET["FineTune"]) <= set(NOT_SUPPORTED_EXAMPLES)


@pytest.mark.parametrize("changes", [{}, *(case.good for case in CASES)], ids=str)
def test_the_types_fill_in_the_defaults_of_the_crd(kube: Client, changes: dict[str, Any]) -> None:
    obj = changed(MINIMAL, changes, EVERYTHING_GROUP)
    stored = kube.create(obj, dry_run=True)
    assert _parsed(stored).spec == _parsed(obj).spec


def _parsed(obj: dict[str, Any]) -> FineTune:
    return FineTune.model_validate({**obj, "apiVersion": MINIMAL["apiVersion"]})
