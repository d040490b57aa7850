"""The server, asked over a socket: by the OpenAI client, and by requests as others may send."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
import requests
import torch
from helpers import TINY, command, command_line, environment, is_one_error_line

from quill import serve, settings
from quill.data import tokenizers
from quill.errors import RunError
from quill.interop import pretrained
from quill.sampling.decoder import Decoder
from quill.sampling.text import SampleOptions, stream_text
from quill.views import insides, served, server

LONG = 2000  # tokens that are not written before a test has done what it wants


class Running:
    """A server in a thread of this process."""

    def __init__(self, *flags: str):
        config = settings.load(serve.ServeConfig, ["--dtype=float32", *flags], usage="")
        self.served = served.load(config)
        self.server = server.new_server(self.served, config.host)
        listener = server.listen(config.host, 0)
        self.host = f"127.0.0.1:{listener.getsockname()[1]}"
        self.url = f"http://{self.host}"
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()
        options = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0}
        self.client = openai.OpenAI(**options, timeout=20)

    def post(self, path: str, contents=None, **options):
        options = {"json": contents, "timeout": 20} | options
        return requests.post(self.url + path, **options)

    def is_idle(self) -> bool:
        engine = self.served.engine
        return not engine.call(lambda: [*engine.batch.texts, *engine.waiting]).result(timeout=20)

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 5
        while not self.is_idle():
            assert time.monotonic() < deadline, "texts are still written"
            time.sleep(0.01)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.served.engine.close()


@pytest.fixture
def running(tiny, call):
    """A server of a tiny run, which takes 4 texts at a time and 2 that wait."""
    assert call("train", *TINY, "--sample_at_eval=5")[0] == 0
    running = Running("--max_texts=4", "--max_waiting=2")
    yield running
    running.close()


def as_sampled(prompt: str, number: int = 0, **options) -> str:
    """What sample.py writes after the prompt."""
    loaded = pretrained.from_folder(Path("out"))
    decoder = Decoder(loaded.build().eval(), loaded.tokenizer.vocab_size)
    options = SampleOptions(num_samples=1, **{"top_k": 0, "temperature": 1.0} | options)
    text = "".join(stream_text(decoder, loaded.tokenizer, prompt, options, number))
    return text.removeprefix(prompt)


# ---- the OpenAI client ---------------------------------------------------------------------------


def test_a_completion_is_what_sample_writes(running):
    [model] = running.client.models.list()
    assert (model.id, model.object) == ("out", "model")
    assert running.client.models.retrieve("out").id == "out"
    asked = {"prompt": ["the king", "queen"], "max_tokens": 30, "n": 2, "seed": 5}
    cuts = {"temperature": 0.9, "top_p": 0.8}
    answer = running.client.completions.create(
        model="out", **asked, **cuts, extra_body={"top_k": 9}
    )
    wanted = {"max_new_tokens": 30, "seed": 5, "top_k": 9, **cuts}
    assert [(c.index, c.finish_reason) for c in answer.choices] == [(i, "length") for i in range(4)]
    assert [c.text for c in answer.choices] == [
        as_sampled(prompt, i, **wanted) for prompt in asked["prompt"] for i in range(2)
    ]
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (13, 120, 133)


def test_streamed_and_whole_are_the_same(running):
    asked = {"model": "out", "prompt": "say", "max_tokens": 25, "n": 2, "seed": 1, "logprobs": 3}
    whole = running.client.completions.create(**asked)
    chunks = [*running.client.completions.create(**asked, stream=True)]
    counted = [
        *running.client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert counted[-1].usage == whole.usage and not counted[-1].choices
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert len(parts) == 25
        assert "".join(part.text for part in parts) == choice.text
        assert [p.finish_reason for p in parts] == [None] * 24 + ["length"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            values = [x for part in parts for x in getattr(part.logprobs, name)]
            assert values == getattr(choice.logprobs, name)
        assert "".join(choice.logprobs.tokens) == choice.text
        assert [choice.text[i] for i in choice.logprobs.text_offset] == choice.logprobs.tokens


def test_logprobs_are_the_models(running):
    answer = running.client.completions.create(
        model="out", prompt="the k", max_tokens=4, temperature=0, logprobs=2
    )
    [choice] = answer.choices
    loaded = pretrained.from_folder(Path("out"))
    ids = loaded.tokenizer.encode("the k" + choice.text)
    with torch.no_grad():
        logits, _ = loaded.build().eval()(torch.from_numpy(ids)[None].long())
    log_probs = logits[0].log_softmax(dim=-1)
    for i in range(4):
        values, tokens = log_probs[4 + i].topk(2)
        wanted = {
            tokenizers.decode(loaded.tokenizer, [t]): pytest.approx(value, abs=1e-5)
            for t, value in zip(tokens.tolist(), values.tolist(), strict=True)
        }
        assert choice.logprobs.top_logprobs[i] == wanted
        assert choice.logprobs.token_logprobs[i] == pytest.approx(values[0].item(), abs=1e-5)


def test_stop_ends_a_text_and_is_left_out(running):
    asked = {"model": "out", "prompt": "the", "max_tokens": 40, "seed": 3}
    [choice] = running.client.completions.create(**asked).choices
    stops = [choice.text[9:12], choice.text[20:23], "never"]
    [cut] = running.client.completions.create(**asked, stop=stops).choices
    assert cut.finish_reason == "stop"
    assert cut.text == choice.text[: min(choice.text.index(stop) for stop in stops[:2])]


def test_chat_is_for_runs_of_prompts_and_answers(sums, call):
    flags = ["--dataset=addition", "--block_size=16", "--max_iters=20", "--eval_interval=10"]
    assert call("train", *TINY, *flags)[0] == 0
    running = Running()
    try:
        messages = [{"role": "user", "content": "3+4="}]
        asked = {"model": "out", "messages": messages, "temperature": 0}
        answer = running.client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        [choice] = answer.choices
        text = call("sample", "--start=3+4=", "--num_samples=1", "--temperature=0")[1]
        assert choice.message.role == "assistant"
        assert "3+4=" + choice.message.content == text.splitlines()[0]
        scores = choice.logprobs.content
        assert len(scores) == answer.usage.completion_tokens
        assert all(s.top_logprobs[0].logprob == s.logprob for s in scores), "greedy"
        chunks = [*running.client.chat.completions.create(**asked, stream=True)]
        assert chunks[0].choices[0].delta.role == "assistant"
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == choice.message.content
        with pytest.raises(openai.BadRequestError, match=r"messages\.0\.content: Input"):
            parts = [{"type": "text", "text": "3+4="}]
            running.client.chat.completions.create(
                model="out", messages=[{"role": "user", "content": parts}]
            )
        with pytest.raises(openai.BadRequestError, match="messages"):
            running.client.chat.completions.create(
                model="out", messages=[{"role": "system", "content": "x"}, *messages]
            )
    finally:
        running.close()


def test_errors_are_those_of_the_api(running):
    create = running.client.completions.create
    asked = {"model": "out", "prompt": "the", "max_tokens": 2}
    with pytest.raises(openai.NotFoundError) as caught:
        create(**asked | {"model": "gpt-4"})
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    for param, value in {
        "temperature": -1.0,
        "top_p": 0.0,
        "n": 5,
        "max_tokens": 10**6,
        "prompt": "\x00",
        "logprobs": 1000,
        "seed": -1,
        "stop": ["x"] * 99,
        "presence_penalty": 1.0,
        "echo": True,
        "best_of": 2,
    }.items():
        with pytest.raises(openai.BadRequestError) as caught:
            create(**asked | {param: value})
        error = caught.value.body
        assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    for prompt in ("", [], [[]], [10**9], [-1], 7, {"a": 1}, [1, "a"]):
        with pytest.raises(openai.BadRequestError) as caught:
            create(**asked | {"prompt": prompt})
        assert caught.value.param == "prompt", prompt
    for prompt, said in {
        (-1,): "token ids are 0 to",
        (True,): "prompt: Input should be a text, a list of texts, token ids",
        ("the", ""): "the prompt is empty",
    }.items():
        with pytest.raises(openai.BadRequestError, match=said) as caught:
            create(**asked | {"prompt": [*prompt]})
        assert caught.value.code is None
    with pytest.raises(openai.BadRequestError, match="Extra inputs"):
        create(**asked, extra_body={"speed": 9})
    with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
        running.client.chat.completions.create(
            model="out", messages=[{"role": "user", "content": "the"}]
        )
    assert running.is_idle()


def test_above_the_limit_it_is_429_and_who_leaves_makes_room(running):
    asked = {"model": "out", "prompt": "the", "max_tokens": LONG}
    streams = [running.client.completions.create(**asked, n=3, stream=True) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        running.client.completions.create(**asked)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    running.wait_until_idle()
    assert running.client.completions.create(**asked | {"max_tokens": 1}).usage.total_tokens == 4


def test_a_client_that_hangs_up_while_it_waits_makes_room(running):
    body = json.dumps({"model": "out", "prompt": "the", "max_tokens": LONG, "n": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {running.host}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(running.host.split(":")) as connection:
        connection.sendall(head.encode() + body)
        while running.is_idle():
            time.sleep(0.01)
    running.wait_until_idle()


def test_a_text_that_fails_is_an_error_of_the_server(running, caplog):
    def fail():
        raise RunError("out of order")

    running.served.engine.batch.step = fail
    with pytest.raises(openai.InternalServerError, match="out of order"):
        running.client.completions.create(model="out", prompt="the")
    with pytest.raises(openai.APIError, match="out of order"):
        [*running.client.completions.create(model="out", prompt="the", stream=True)]
    assert caplog.text == "", "it is no bug"
    del running.served.engine.batch.step
    assert running.client.completions.create(model="out", prompt="the").choices[0].text


def test_a_long_stop_costs_little(running):
    stop = "q" * 200_000
    asked = {"model": "out", "prompt": "the", "max_tokens": 200, "stop": [stop]}
    assert running.client.completions.create(**asked).usage.completion_tokens == 200


def test_calls_and_texts_do_not_keep_each_other_waiting(running):
    engine, is_over = running.served.engine, threading.Event()

    def call_again():
        if not is_over.is_set():
            engine.call(call_again)

    engine.call(call_again)
    asked = {"model": "out", "prompt": "the", "max_tokens": 50}
    assert running.client.completions.create(**asked).usage.completion_tokens == 50
    is_over.set()
    for _ in range(2):  # behind the last of those calls
        engine.call(lambda: None).result(timeout=20)
    has_begun, may_end = threading.Event(), threading.Event()
    calls = [engine.call(lambda: has_begun.set() or may_end.wait(20))]
    has_begun.wait()
    calls += [engine.call(lambda: True) for _ in range(3)]  # as many may wait
    answer = running.post("/page/read", {"text": "the"})
    may_end.set()
    assert answer.status_code == 429 and all(call.result(timeout=20) for call in calls)


def test_a_text_ends_when_its_time_is_up(tiny, call):
    assert call("train", *TINY)[0] == 0
    running = Running("--max_seconds=0.1")
    try:
        [choice] = running.client.completions.create(
            model="out", prompt="the", max_tokens=4096
        ).choices
        assert choice.finish_reason == "length" and 1 <= len(choice.text) < 4096
    finally:
        running.close()


# ---- who may ask, and what -----------------------------------------------------------------------


ASKING = [
    ({}, 200),
    ({"Origin": "http://{host}"}, 200),
    ({"Host": "localhost:1234"}, 200),
    ({"Host": "[::1]:80"}, 200),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Host": "evil.example"}, 403),
    ({"Host": "localhost.evil.example"}, 403),
    ({"Host": "[::1"}, 403),
    ({"Host": ""}, 403),
]


def test_pages_of_others_may_not_ask(running):
    for (headers, status), path in itertools.product(ASKING, ("/v1/models", "/page/about", "/")):
        headers = {name: value.format(host=running.host) for name, value in headers.items()}
        answer = requests.get(running.url + path, headers=headers, timeout=20)
        assert answer.status_code == status, (headers, path)
        assert "access-control-allow-origin" not in answer.headers
        assert "script-src 'self'" in answer.headers["content-security-policy"]


def test_bodies_that_are_none(running, caplog):
    good = {"model": "out", "prompt": "the", "max_tokens": 1}
    assert running.post("/v1/completions", good).status_code == 200
    form = running.post("/v1/completions", None, data=json.dumps(good))
    assert form.status_code == 415, "a page can send text/plain to anyone"
    kind = {"content-type": "application/json"}
    for body in (
        b"",
        b"{",
        b"[" * 10**5,
        b'{"model": "out", "prompt": "\\ud800"}',
        b"\xff",
        b"7",
        b"null",
        b'{"prompt": NaN}',
    ):
        answer = running.post("/v1/completions", None, data=body, headers=kind)
        assert answer.status_code == 400 and "error" in answer.json(), body[:10]
    with socket.create_connection(running.host.split(":")) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {running.host}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        connection.sendall(head.encode())
    big = running.post("/v1/completions", good | {"user": "x" * (1 << 20)})
    assert big.status_code == 413
    assert running.post("/nowhere", {}).status_code == 404
    wrong = requests.get(running.url + "/v1/completions", timeout=9)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert caplog.text == ""
    assert (
        "not found"
        in requests.get(running.url + "/no", timeout=9).json()["error"]["message"].lower()
    )
    assert requests.get(running.url + "/static/%2e%2e/server.py", timeout=9).status_code == 404


# ---- what the page asks --------------------------------------------------------------------------


def test_reading_and_looking_are_the_models(running):
    loaded = pretrained.from_folder(Path("out"))
    model = loaded.build().eval()
    text = "the king and queen of hearts"  # longer than the context of 16
    ids = torch.from_numpy(loaded.tokenizer.encode(text)).long()
    read = running.post("/page/read", {"text": text, "temperature": 0.5, "top_k": 3}).json()
    assert read["n_unread"] == len(text) - 16
    assert "".join(token["text"] for token in read["tokens"]) == text
    surprises = [token["surprise"] for token in read["tokens"]]
    assert surprises[: len(text) - 15] == [None] * (len(text) - 15)
    with torch.no_grad():
        surprise, _, _ = insides.guesses(model, ids[-16:], loaded.tokenizer.vocab_size, 1)
        probs = model(ids[None, -16:])[0][0, -1].softmax(dim=-1)
        maps = insides.attention_maps(model, ids[-16:])
    assert surprises[-15:] == pytest.approx(surprise.tolist(), abs=2e-5)
    top = read["next"]
    assert [token["id"] for token in top] == probs.topk(20).indices.tolist()
    assert [token["prob"] for token in top] == pytest.approx(probs.topk(20).values, abs=2e-5)
    squares = probs.topk(3).values ** 2  # temperature 0.5
    assert [t["drawn"] for t in top[:3]] == pytest.approx(squares / squares.sum(), abs=2e-5)
    assert [token["drawn"] for token in top[3:]] == [0] * 17
    seen = running.post("/page/look", {"text": ids[-16:].tolist()}).json()
    torch.testing.assert_close(torch.tensor(seen["attention"]), maps[:, :, -1], atol=2e-5, rtol=0)
    assert len(seen["lens"]) == 3
    assert [t["prob"] for t in seen["lens"][-1]] == pytest.approx(probs.topk(5).values, abs=2e-5)
    for bad in ({}, {"text": ""}, {"text": [10**9]}, {"text": "a", "x": 1}):
        assert running.post("/page/look", bad).status_code == 400


def test_the_stages_are_where_model_py_says(running):
    about = requests.get(running.url + "/page/about", timeout=20).json()
    stages = {stage["name"]: stage for stage in about["stages"]}
    lines = Path(insides.__file__).parents[2].joinpath("model.py").read_text().splitlines()
    assert "self.c_attn(x)" in lines[stages["h.0.attn.c_attn"]["line"] - 1]
    assert "attend(q, k, v" in lines[stages["h.0.attn: attention weights"]["line"] - 1]
    assert "self.lm_head(" in lines[stages["lm_head"]["line"] - 1]
    assert stages["h.0.attn.c_attn"]["shape"] == [1, 16, 48]
    assert stages["h.0.attn: q, k and v, each"]["shape"] == [1, 2, 16, 8]


def test_metrics_come_as_they_grow(running):
    def ask(start):
        return requests.get(f"{running.url}/page/metrics?start={start}", timeout=20).json()

    first = ask(0)
    assert [r["step"] for r in first["records"] if "val_loss" in r] == [0, 3, 6]
    assert all("sample" in r for r in first["records"] if "val_loss" in r)
    assert ask(first["next"]) == {"records": [], "start": first["next"], "next": first["next"]}
    path = Path("out/metrics.jsonl")
    with path.open("ab") as file:
        file.write(b'{"step": 8, "val_loss": NaN}\n{"step": 8, "sample": "\\ud800"}\n')
        file.write(b'{"step": 9, "val_loss": 1.5}\n[1]\n{{\n{"step": 10')
    more = ask(first["next"])
    assert more["records"] == [{"step": 9, "val_loss": 1.5}]
    path.write_bytes(b'{"step": 0, "val_loss": 4.5}\n')  # a new run
    assert ask(more["next"])["records"] == [{"step": 0, "val_loss": 4.5}]
    assert requests.get(running.url + "/page/metrics?start=x", timeout=9).status_code == 400


def test_a_bigram_is_served(tiny, call):
    assert call("train", *TINY, "--model=bigram")[0] == 0
    running = Running()
    try:
        answer = running.client.completions.create(model="out", prompt="th", max_tokens=9, seed=2)
        assert answer.choices[0].text == as_sampled("th", max_new_tokens=9, seed=2)
        assert running.post("/page/read", {"text": "the"}).json()["tokens"][2]["surprise"] > 0
        assert running.post("/page/look", {"text": "the"}).status_code == 400
        assert requests.get(running.url + "/page/about", timeout=9).json()["is_gpt"] is False
    finally:
        running.close()


# ---- the command ---------------------------------------------------------------------------------


def test_what_keeps_the_command_from_starting(tiny, call, monkeypatch):
    assert call("train", *TINY)[0] == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("serve", f"--port={port}")
    assert done.returncode == 2 and is_one_error_line(done.stderr)
    assert f"port={port}: choose another" in done.stderr
    code, _, err = call("serve", "--port=0", "--out_dir=nothing")
    assert code == 2 and "nothing/ckpt.pt is missing" in err
    for host in ("nowhere.invalid", "ü..b", ""):
        code, _, err = call("serve", f"--host={host}")
        assert code == 2 and is_one_error_line(err) and f"host={host}" in err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = call("serve")
    assert code == 2 and is_one_error_line(err) and "pip install '.[web]'" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_signal_ends_texts_with_an_error_and_no_traceback(tiny, call, number, code):
    assert call("train", *TINY)[0] == 0
    line = command_line("serve", "--port=0", "--max_new_tokens=1000000")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment(), **pipes) as process:
        url = process.stdout.readline().split()[0]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
        asked = {"model": "out", "prompt": "the", "max_tokens": 10**6, "stream": True}
        with client, pytest.raises(openai.APIError, match="stopping"):
            for _ in client.completions.create(**asked):
                process.send_signal(number)
                number = 0  # once: 0 is no signal
        _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert err == ("error: interrupted\n" if code == 130 else "")
