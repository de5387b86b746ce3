"""The plain loop that tutorials teach: pad everything to the longest length, compute in float32, step.

python bench/trainer/naive.py --model DIR --data FILE --output DIR --steps 5 ...
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--batch-size", type=int, required=True)
parser.add_argument("--max-length", type=int, required=True)
parser.add_argument("--rank", type=int, required=True)
parser.add_argument("--alpha", type=int, required=True)
parser.add_argument("--dropout", type=float, required=True)
parser.add_argument("--learning-rate", type=float, required=True)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
model = get_peft_model(
    model,
    LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    ),
)


def tokenize(row: dict) -> dict:
    prompt = tokenizer(row["prompt"])["input_ids"]
    text = row["prompt"] + row["completion"] + tokenizer.eos_token
    encoded = tokenizer(text, max_length=args.max_length, truncation=True, padding="max_length")
    labels = [-100 if not mask else token for token, mask in zip(encoded["input_ids"], encoded["attention_mask"])]
    labels[: len(prompt)] = [-100] * len(prompt)
    return {**encoded, "labels": labels}


dataset = load_dataset("json", data_files=args.data, split="train")
dataset = dataset.map(tokenize, remove_columns=dataset.column_names)
loader = DataLoader(dataset, batch_size=args.batch_size, collate_fn=default_data_collator)
optimizer = torch.optim.AdamW(
    [parameter for parameter in model.parameters() if parameter.requires_grad], lr=args.learning_rate, weight_decay=0.0
)

print("ready", flush=True)
model.train()
for step, batch in enumerate(loader):
    if step == args.steps:
        break
    batch.pop("token_type_ids", None)
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print({"step": step + 1, "loss": loss.item()}, flush=True)
model.save_pretrained(args.output)
