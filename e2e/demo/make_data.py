"""Write the demo's data: a fictional company's support facts, each asked in several ways.

python e2e/demo/make_data.py          # writes e2e/demo/data/{train,evaluation}.jsonl; both are checked in

Each fact's last wording goes to the evaluation set alone, so that a lower evaluation loss means a fact was learned and
not a sentence. The question that the demo asks is one of those.
"""

from __future__ import annotations

import json
from pathlib import Path

DATA = Path(__file__).parent / "data"

# (product noun phrase, answer, wordings); {it} is the product.
FACTS: list[tuple[str, str, list[str]]] = [
    (
        "the Zorblax router",
        "The light is amber when there is no link.",
        [
            "What colour is the light of {it} when it has no link?",
            "Which colour does {it} show when there is no link?",
            "{it} has no link. What colour is its light?",
            "What colour is the light on {it} without a link?",
            "No link on {it}: which colour is the light?",
            "Tell me the colour of the light when {it} has no link.",
            "What colour is {its} light when it has no link?",
        ],
    ),
    (
        "the Zorblax router",
        "Hold the reset key for twelve seconds.",
        [
            "How do I reset {it}?",
            "How can I reset {it}?",
            "I want to reset {it}. What should I do?",
            "What must I do to reset {it}?",
            "How is {it} reset?",
            "Tell me how to reset {it}.",
            "How do we reset {it}?",
        ],
    ),
    (
        "the Vexo kettle",
        "It holds two litres of water.",
        [
            "How much water does {it} hold?",
            "How much water can I put in {it}?",
            "How many litres does {it} hold?",
            "What does {it} hold?",
            "How many litres of water fit in {it}?",
            "Tell me how much water {it} holds.",
            "How much water fits in {it}?",
        ],
    ),
    (
        "the Vexo kettle",
        "Clean it with lemon juice once a month.",
        [
            "How do I clean {it}?",
            "How should I clean {it}?",
            "What do I clean {it} with?",
            "How often do I clean {it}?",
            "I want to clean {it}. What should I do?",
            "Tell me how to clean {it}.",
            "How do we clean {it}?",
        ],
    ),
    (
        "the Quilton printer",
        "It takes the green label paper from the warehouse.",
        [
            "Which paper fits {it}?",
            "Which paper does {it} take?",
            "What paper do I put in {it}?",
            "Which paper do I need for {it}?",
            "What paper does {it} use?",
            "Tell me which paper {it} takes.",
            "What paper fits {it}?",
        ],
    ),
    (
        "the Quilton printer",
        "Rosa repairs it on Thursday.",
        [
            "Who repairs {it}?",
            "Who can repair {it}?",
            "{it} is broken. Who repairs it?",
            "Who do I ask to repair {it}?",
            "When is {it} repaired?",
            "Tell me who repairs {it}.",
            "Who will repair {it}?",
        ],
    ),
    (
        "the Marlo lamp",
        "Its battery lasts ninety hours.",
        [
            "How long does the battery of {it} last?",
            "How long does {it} run on its battery?",
            "How many hours does the battery of {it} last?",
            "What is the battery life of {it}?",
            "How long is the battery life of {it}?",
            "Tell me how long the battery of {it} lasts.",
            "How long does {its} battery last?",
        ],
    ),
    (
        "the Marlo lamp",
        "Turn the silver ring to the left.",
        [
            "How do I make {it} darker?",
            "How can I make {it} darker?",
            "{it} is too bright. What should I do?",
            "What makes {it} darker?",
            "How do I dim {it}?",
            "Tell me how to make {it} darker.",
            "How do we make {it} darker?",
        ],
    ),
    (
        "the Trafen drone",
        "You may fly it in the garden, never in the harbour.",
        [
            "Where may I fly {it}?",
            "Where can I fly {it}?",
            "Can I fly {it} in the harbour?",
            "Is it allowed to fly {it} in the harbour?",
            "In which place may I fly {it}?",
            "Tell me where I may fly {it}.",
            "Where are we allowed to fly {it}?",
        ],
    ),
    (
        "the Trafen drone",
        "Order a new rotor with the code DR-48.",
        [
            "How do I order a new rotor for {it}?",
            "What is the code of the rotor for {it}?",
            "Which rotor fits {it}?",
            "I need a new rotor for {it}. What do I order?",
            "What is the order code of the rotor of {it}?",
            "Tell me the code of the rotor for {it}.",
            "Which code has the rotor of {it}?",
        ],
    ),
    (
        "the Solka heater",
        "Wait fifteen minutes before you open the cover.",
        [
            "When can I open the cover of {it}?",
            "How long do I wait before I open {it}?",
            "How long should I wait before I open the cover of {it}?",
            "When may I open {it}?",
            "May I open the cover of {it} at once?",
            "Tell me when I may open the cover of {it}.",
            "How long must I wait to open {it}?",
        ],
    ),
    (
        "the Solka heater",
        "Three beeps mean that the filter is full.",
        [
            "What do three beeps of {it} mean?",
            "{it} beeps three times. What does it mean?",
            "Why does {it} beep three times?",
            "What does it mean when {it} beeps?",
            "{it} beeps. What is wrong?",
            "Tell me what three beeps of {it} mean.",
            "What is wrong when {it} beeps three times?",
        ],
    ),
]
OPENINGS = ["", "Hello! ", "Please help me. ", "I have a question. "]


def fill(wording: str, product: str) -> str:
    question = wording.format(it=product, its=f"{product}'s")
    return question[0].upper() + question[1:]


def row(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def training_rows() -> list[dict[str, object]]:
    return [
        row(opening + fill(wording, product), answer)
        for opening in OPENINGS
        for product, answer, wordings in FACTS
        for wording in wordings[:-1]
    ]


def evaluation_rows() -> list[dict[str, object]]:
    return [row(fill(wordings[-1], product), answer) for product, answer, wordings in FACTS]


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, rows in {"train": training_rows(), "evaluation": evaluation_rows()}.items():
        lines = [json.dumps(entry, ensure_ascii=False) for entry in rows]
        (DATA / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{DATA / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
