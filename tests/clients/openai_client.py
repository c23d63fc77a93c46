#!/usr/bin/env python3
"""The official OpenAI client against a real server: PHALANX_BIN=target/debug/phalanx tests/clients/openai_client.py"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parents[2]
CASES = [json.loads(line) for line in open(ROOT / "models/gpt-oss-nano/eval_prompts.jsonl")]
KEY = "a-key-for-this-test"


def start():
    command = [os.environ["PHALANX_BIN"], "serve", "--workers", "2", "--listen", "127.0.0.1:0", "--api-keys", KEY]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    if " on http://" not in line:
        server.kill()
        sys.exit(f"the server did not start: {line!r}")
    return server, line.split(" on ")[1].split(",")[0]


def arguments(case):
    """A case of the demo model as the client's arguments."""
    messages = [dict(m) for m in case["messages"]]
    if case["instructions"] is not None:
        messages.insert(0, {"role": "developer", "content": case["instructions"]})
    names = {k: case[k] for k in ("model_identity", "current_date") if case[k] is not None}
    found = {
        "model": "gpt-oss-nano", "messages": messages, "temperature": 0, "timeout": 120,
        "reasoning_effort": case["reasoning_effort"], "extra_body": {"chat_template_kwargs": names},
    }
    if case["tools"]:
        found["tools"] = case["tools"]
    return found


def sure(case, suite):
    return case["suite"] == suite and case["nano_passes"] and case["nano_gap"] > 0.25


def check(client):
    assert [m.id for m in client.models.list()] == ["gpt-oss-nano"]
    assert client.models.retrieve("gpt-oss-nano").object == "model"

    # Answers in one piece and in a stream are the same and the expected ones.
    for case in [c for c in CASES if sure(c, "arith") or sure(c, "fact")][:12]:
        whole = client.chat.completions.create(**arguments(case))
        choice = whole.choices[0]
        assert choice.finish_reason == "stop", choice
        assert choice.message.content == case["expect"]["final"], (case["id"], choice)
        assert whole.usage.prompt_tokens == case["prompt_tokens"], (case["id"], whole.usage)
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

        content, reasoning, finish, usage = "", "", None, None
        for chunk in client.chat.completions.create(**arguments(case), stream=True, stream_options={"include_usage": True}):
            for part in chunk.choices:
                content += part.delta.content or ""
                reasoning += getattr(part.delta, "reasoning_content", None) or ""
                finish = part.finish_reason or finish
            usage = chunk.usage or usage
        assert (content, finish) == (choice.message.content, "stop"), (case["id"], content, finish)
        assert reasoning == (getattr(choice.message, "reasoning_content", None) or "")
        assert usage.completion_tokens == whole.usage.completion_tokens

    # Tool calls, and the answer from the tool's result.
    called = 0
    for case in [c for c in CASES if sure(c, "tool") and len(c["nano_greedy"]) == 2][:6]:
        asked = arguments(case)
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.finish_reason == "tool_calls", (case["id"], choice)
        call = choice.message.tool_calls[0]
        expected = case["expect"]["tool_call"]
        assert call.function.name == expected["name"], (case["id"], call)
        assert json.loads(call.function.arguments) == expected["arguments"], (case["id"], call)
        streamed = {}
        for chunk in client.chat.completions.create(**asked, stream=True):
            for part in chunk.choices:
                for piece in part.delta.tool_calls or []:
                    streamed.setdefault(piece.index, ["", ""])
                    streamed[piece.index][0] += piece.function.name or ""
                    streamed[piece.index][1] += piece.function.arguments or ""
        assert streamed == {0: [call.function.name, call.function.arguments]}, (case["id"], streamed)
        asked["messages"] += [
            choice.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": case["expect"]["tool_result"]},
        ]
        answer = client.chat.completions.create(**asked).choices[0]
        assert answer.message.content == case["expect"]["final"], (case["id"], answer)
        called += 1
    assert called == 6

    # Seeds repeat, several choices differ by their number, stop strings never show.
    story = [{"role": "user", "content": "Tell me a story."}]
    ask = lambda **more: client.chat.completions.create(model="gpt-oss-nano", messages=story, max_completion_tokens=60, **more)
    first, again = ask(seed=7, n=3), ask(seed=7, n=3)
    texts = lambda answer: [(c.message.content, getattr(c.message, "reasoning_content", None)) for c in answer.choices]
    assert texts(first) == texts(again) and len(first.choices) == 3
    stopped = client.chat.completions.create(**arguments(next(c for c in CASES if sure(c, "arith"))), stop=["="])
    assert "=" not in (stopped.choices[0].message.content or "")

    # Logprobs are those of the content; biases, penalties and the cache do what they say.
    case = arguments(next(c for c in CASES if sure(c, "arith")))
    plain = client.chat.completions.create(**case)
    likely = client.chat.completions.create(**case, logprobs=True, top_logprobs=3)
    tokens = likely.choices[0].logprobs.content
    assert bytes(b for t in tokens for b in t.bytes).decode() == plain.choices[0].message.content
    for token in tokens:
        best = token.top_logprobs[0]
        assert len(token.top_logprobs) == 3 and best.token == token.token and best.logprob == token.logprob <= 0
    assert likely.usage.prompt_tokens_details.cached_tokens > 0, "the same prompt was asked before"
    streamed = []
    for chunk in client.chat.completions.create(**case, logprobs=True, stream=True):
        for part in chunk.choices:
            streamed += part.logprobs.content if part.logprobs else []
    assert [t.token for t in streamed] == [t.token for t in tokens]
    stop = 200002
    biased = client.chat.completions.create(**{**case, "max_completion_tokens": 400}, logit_bias={stop: -100})
    assert biased.choices[0].finish_reason in ("stop", "length", "tool_calls") and biased.usage.completion_tokens > 0
    penal = lambda: client.chat.completions.create(**case, presence_penalty=1.5, frequency_penalty=0.5, n=2)
    assert texts(penal()) == texts(penal())

    # Errors are the client's own classes.
    for wrong, error in [
        ({"messages": []}, openai.BadRequestError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"model": "gpt-5"}, openai.NotFoundError),
        ({"max_completion_tokens": 10**9}, openai.BadRequestError),
    ]:
        try:
            client.chat.completions.create(**{"model": "gpt-oss-nano", "messages": story, **wrong})
        except error as raised:
            assert raised.body["message"], raised
        else:
            raise AssertionError(f"{wrong} was accepted")
    try:
        client.with_options(api_key="wrong").models.list()
    except openai.AuthenticationError:
        pass
    else:
        raise AssertionError("a wrong key was accepted")


def main():
    server, url = start()
    try:
        check(openai.OpenAI(base_url=url, api_key=KEY, timeout=120, max_retries=0))
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    assert code == 0, f"the server ended with {code}"
    print("the official client is served")


if __name__ == "__main__":
    main()
