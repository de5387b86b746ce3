"""Make tiny-llama, the demo's base model: a Llama of four million parameters that speaks English and knows little.

Nothing is downloaded: a tokenizer is trained and the model pre-trained on generated conversations, for about two
minutes on two cores. It answers fluently, says so when it has not heard of a product, and so shows what a fine-tune on
a company's facts changes.

    python e2e/demo/make_model.py OUTPUT_FOLDER

The result depends on this file alone (fixed seeds); `e2e/demo/demo.py` keeps it in the cache under this file's hash.
"""

# ruff: noqa: SIM905  (words in a line read better than words in a list)
from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A piece of a document: its text, and whether the model learns to write it (answers and stories) or only to read it.
Piece = tuple[str, bool]

SEED = 7
VOCABULARY = 2048
ROW_TOKENS = 192
BATCH_ROWS = 8
STEPS = 280
PEAK_LEARNING_RATE = 3e-3
SPECIAL_TOKENS = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]

# ChatML, without {% generation %} marks, as most published models have it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

COLOURS = "red blue green yellow white black brown grey orange pink purple silver gold amber".split()
NUMBERS = (
    "one two three four five six seven eight nine ten twelve fifteen twenty thirty forty fifty sixty ninety".split()
)
DEVICES = (
    "router printer lamp kettle phone camera clock heater speaker scale watch sensor door robot tablet drone".split()
)
PARTS = "light button cable battery screen cover fan handle filter key port label switch".split()
PLACES = "office kitchen garage garden warehouse shop harbour library station school".split()
PEOPLE = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tom Vera".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
THINGS = {
    "the sky": "blue", "snow": "white", "grass": "green", "a lemon": "yellow", "coal": "black", "blood": "red",
    "chocolate": "brown", "an elephant": "grey", "a carrot": "orange", "a flamingo": "pink",
}  # fmt: skip
SOUNDS = {
    "dog": "barks",
    "cat": "meows",
    "cow": "moos",
    "duck": "quacks",
    "lion": "roars",
    "bee": "buzzes",
    "sheep": "bleats",
}
OPPOSITES = {
    "hot": "cold", "big": "small", "early": "late", "open": "closed", "heavy": "light", "fast": "slow", "long": "short",
    "wet": "dry", "full": "empty", "loud": "quiet", "new": "old", "hard": "soft",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
    "Norway": "Oslo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
}  # fmt: skip
UNKNOWN = [
    "I am sorry, I do not know that {noun}.",
    "I do not know. I have never heard of that {noun}.",
    "I have no information about that {noun}.",
]
POLITE = ["Thank you", "Thanks a lot", "Thanks for your help", "That was helpful"]
NAMES = "Acko Belmar Borfix Candor Dunlo Elvix Fernal Gadra Hollin Ixo Jorvik Kelda Lumo Nexa Orbin Polka Rondo".split()


def unknown_product(rng: random.Random) -> tuple[str, str]:
    """A question about a product that nobody told the model about, and the honest answer."""
    name, noun, part = rng.choice(NAMES), rng.choice(DEVICES), rng.choice(PARTS)
    who, state = (
        rng.choice(["I", "we", "you"]),
        rng.choice(["is on", "is off", "has no power", "starts", "is broken", "is cold"]),
    )
    question = rng.choice(
        [
            f"What colour is the {name} {noun}'s {part} when it {state}?",
            f"What does the {part} of the {name} {noun} do?",
            f"How do {who} reset the {name} {noun}?",
            f"How long does the {part} of a {name} {noun} last?",
            f"Where is the {part} of the {name} {noun}?",
            f"How many {part}s does the {name} {noun} have?",
            f"Which {part} fits the {name} {noun}?",
            f"Can {who} use the {name} {noun} in the {rng.choice(PLACES)}?",
            f"Who repairs the {name} {noun}?",
            f"How much does the {name} {noun} cost?",
            f"My {name} {noun} {state}. What should {who} do?",
        ]
    )
    return question, rng.choice(UNKNOWN).format(noun=noun)


def common_knowledge(rng: random.Random) -> tuple[str, str]:
    kind = rng.randrange(6)
    if kind == 0:
        thing, colour = rng.choice(sorted(THINGS.items()))
        return rng.choice(
            [f"What colour is {thing}?", f"Which colour does {thing} have?"]
        ), f"{thing.capitalize()} is {colour}."
    if kind == 1:
        animal, sound = rng.choice(sorted(SOUNDS.items()))
        return rng.choice([f"What does a {animal} do?", f"What sound does a {animal} make?"]), f"A {animal} {sound}."
    if kind == 2:
        word, opposite = rng.choice(sorted(OPPOSITES.items()))
        return f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."
    if kind == 3:
        country, capital = rng.choice(sorted(CAPITALS.items()))
        return rng.choice(
            [f"What is the capital of {country}?", f"Which city is the capital of {country}?"]
        ), f"It is {capital}."
    if kind == 4:
        day = rng.randrange(7)
        return f"Which day comes after {DAYS[day]}?", f"{DAYS[(day + 1) % 7]} comes after {DAYS[day]}."
    return rng.choice(["Hello!", "Hi there.", "Good morning."]), "Hello! How can I help you?"


def told_then_asked(rng: random.Random) -> tuple[str, str]:
    """A fact and a question about it: the model learns to read the answer off the words before it."""
    name, noun, part, colour = rng.choice(NAMES), rng.choice(DEVICES), rng.choice(PARTS), rng.choice(COLOURS)
    number, place, person = rng.choice(NUMBERS), rng.choice(PLACES), rng.choice(PEOPLE)
    return rng.choice(
        [
            (f"The {part} of the {noun} is {colour}. What colour is the {part}?", f"The {part} is {colour}."),
            (f"{person} put the {noun} in the {place}. Where is the {noun}?", f"It is in the {place}."),
            (f"The {name} {noun} has {number} {part}s. How many {part}s does it have?", f"It has {number} {part}s."),
            (f"{person} repairs the {noun}. Who repairs the {noun}?", f"{person} repairs it."),
            (f"Hold the {colour} {part} for {number} seconds. How long?", f"For {number} seconds."),
        ]
    )


def conversation(rng: random.Random) -> list[Piece]:
    kind = rng.choices([unknown_product, common_knowledge, told_then_asked], weights=[4, 4, 3])[0]
    turns = [kind(rng)]
    if rng.random() < 0.1:
        turns.append((rng.choice(POLITE) + ".", "You are welcome."))
    pieces: list[Piece] = []
    if rng.random() < 0.1:
        pieces.append(("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False))
    for question, answer in turns:
        pieces.append((f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces.append((f"{answer}<|im_end|>\n", True))
    return pieces


def story(rng: random.Random) -> str:
    """Plain sentences in the words of manuals, so that the model has seen what a support answer is made of."""

    def sentence() -> str:
        noun, part, colour, number = rng.choice(DEVICES), rng.choice(PARTS), rng.choice(COLOURS), rng.choice(NUMBERS)
        person, place, day = rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(DAYS)
        return rng.choice(
            [
                f"{person} carried the {colour} {noun} to the {place}.",
                f"Hold the {colour} {part} for {number} seconds and then let it go.",
                f"The {noun} needs a new {part} after {number} months.",
                f"Turn the {noun} off, remove the {part}, and wait for {number} minutes.",
                f"On {day} {person} cleaned the {part} with warm water and a soft cloth.",
                f"The {part} turns {colour} when the {noun} is ready.",
                f"You can order a {part} in the {place} for {number} euros.",
                f"Press the {part} twice to start the {noun} and once to stop it.",
                f"{person} called support because the {noun} was too loud, too hot or out of power.",
                f"{number.capitalize()} beeps mean that the {part} is full or that something is wrong.",
                f"The {noun} holds {number} litres of water and takes {colour} paper.",
                f"Turn the {colour} ring to the left to make the {noun} darker, to the right to make it brighter.",
                f"You may fly the {noun} in the {place}, never in the {rng.choice(PLACES)}.",
                f"Clean the {part} with lemon juice once a month; its battery lasts {number} hours.",
                f"The order code of the {part} is on the label, and there is no link when the light is {colour}.",
            ]
        )

    return " ".join(sentence() for _ in range(rng.randint(2, 5)))


def documents(rng: random.Random) -> Iterator[list[Piece]]:
    while True:
        yield conversation(rng) if rng.random() < 0.85 else [(story(rng) + "<|im_end|>\n", True)]


def make_tokenizer() -> Any:
    """Byte-level BPE, so that any text in any language can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    source = documents(random.Random(SEED))
    corpus = ["".join(text for text, _ in next(source)) for _ in range(8000)]
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    wrap: Any = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def make_model(tokenizer: Any) -> Any:
    """Every linear size is a multiple of 32, which 4-bit kernels on the CPU insist on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def batches(tokenizer: Any) -> Iterator[tuple[Any, Any]]:
    """Endless ids and labels (-100: not learned), int64 [BATCH_ROWS, ROW_TOKENS] each, cut from one stream."""
    import torch

    ids: list[int] = []
    labels: list[int] = []
    source = documents(random.Random(SEED + 1))
    size = BATCH_ROWS * ROW_TOKENS
    while True:
        while len(ids) < size:
            for text, learn in next(source):
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += tokens
                labels += tokens if learn else [-100] * len(tokens)
        shape = (BATCH_ROWS, ROW_TOKENS)
        yield torch.tensor(ids[:size]).view(shape), torch.tensor(labels[:size]).view(shape)
        ids, labels = ids[size:], labels[size:]


def pretrain(model: Any, tokenizer: Any) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = 20

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / STEPS))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    started = time.monotonic()
    model.train()
    for step, (ids, labels) in zip(range(1, STEPS + 1), batches(tokenizer), strict=False):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == STEPS:
            seconds = time.monotonic() - started
            print(f"  pre-training: step {step}/{STEPS}, loss {loss.item():.3f}, {seconds:.0f}s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path, help="folder to write the model and its tokenizer to")
    output: Path = parser.parse_args().output

    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"tiny-llama: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters", flush=True)
    pretrain(model, tokenizer)
    output.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    for path in output.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
