"""llama.cpp itself, in a process of its own: loads a GGUF file, tokenizes texts and says how likely the next tokens are.

    python -m finetune_trainer.results.gguffile.engine FILE < question.json > answer.json

In a process of its own because llama.cpp ends the process when it does not like a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Ids = list[int]
#: Of the next token, this many of the likeliest are compared; a vocabulary may have 256,000.
LIKELIEST = 512


class Refused(Exception):
    """llama.cpp cannot load the file; the text is what it says."""


class Answer(NamedTuple):
    """Token ids of each text; of each prompt the likeliest next tokens with their log probabilities; the conversation as
    the chat template writes it.
    """

    tokens: list[Ids]
    next: list[dict[int, float]]
    chat: str


def ask(file: Path, texts: Sequence[str], prompts: Sequence[Ids], messages: Sequence[Any]) -> Answer:
    """What llama.cpp makes of texts, prompts (token ids) and a conversation; Refused when it cannot load the file."""
    question = {"texts": list(texts), "prompts": list(prompts), "messages": list(messages)}
    command = [sys.executable, "-m", __name__, str(file)]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower() or "GGML_ASSERT" in line] or lines[-1:]
        raise Refused(f"exit code {done.returncode}: {' | '.join(telling)[-600:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    likeliest = [{int(id): value for id, value in pairs} for pairs in answer["next"]]
    return Answer(answer["tokens"], likeliest, answer["chat"])


def main() -> None:
    question = json.load(sys.stdin)
    longest = max(len(prompt) for prompt in question["prompts"] or [[]])
    server = _server(sys.argv[1], longest + 8)
    tokens = [_tokenize(server.listening_address, text) for text in question["texts"]]
    letter = _tokenize(server.listening_address, "a", whole=False)[-1]
    likeliest = [_next(server, prompt, letter) for prompt in question["prompts"]]
    chat = _chat(server.listening_address, question["messages"]) if question["messages"] else ""
    print(json.dumps({"tokens": tokens, "next": likeliest, "chat": chat}), flush=True)
    os._exit(0)  # its threads need not be waited for


def _server(file: str, context: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = params.fit_params = False
    params.no_extra_bufts = True  # no second copy of the weights in another order: the file is mapped into memory
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    # As transformers computes: nothing is rounded between the layers.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def _tokenize(address: str, text: str, whole: bool = True) -> Ids:
    tokens: Ids = _post(f"{address}/tokenize", content=text, add_special=whole, parse_special=True)["tokens"]
    return tokens


def _chat(address: str, messages: list[Any]) -> str:
    try:
        return str(_post(f"{address}/apply-template", messages=messages)["prompt"])
    except urllib.error.HTTPError as error:
        return f"{error}: {error.read()[:500]!r}"


def _post(url: str, **body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
        return json.load(response)


def _next(server: Any, prompt: Ids, letter: int) -> list[tuple[int, float]]:
    # Whatever it finds likeliest, it answers with a letter: of half a character it would tell nothing. The bias is added
    # after the probabilities.
    answer = server.handle_completions(
        {"prompt": prompt, "n_predict": 1, "n_probs": LIKELIEST, "temperature": 0, "cache_prompt": False,
         "logit_bias": [[letter, 1e4]]}
    )  # fmt: skip
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp: {json.dumps(answer)[:500]}")
    (place,) = answer["choices"][0]["logprobs"]["content"]
    return [(entry["id"], entry["logprob"]) for entry in place["top_logprobs"]]


if __name__ == "__main__":
    main()
