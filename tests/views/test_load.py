"""Many clients for a while: as many seconds as QUILL_LOAD_SECONDS says; -s shows the counts."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import openai
import pytest
from helpers import TINY, command_line, environment

from quill.interop import pretrained
from quill.sampling.decoder import Decoder
from quill.sampling.text import SampleOptions, stream_text

SECONDS = float(os.environ.get("QUILL_LOAD_SECONDS", "20"))
N_CLIENTS, N_REQUESTS = 64, 40  # of the latter, different ones


def requests_with_answers() -> list[tuple[dict, str]]:
    """Of mixed lengths; what sample.py would write."""
    loaded, rng = pretrained.from_folder(Path("out")), random.Random(0)
    decoder, found = Decoder(loaded.build().eval(), loaded.tokenizer.vocab_size), []
    for seed in range(N_REQUESTS):
        prompt = "the king and queen of hearts; to sleep"[: rng.randint(1, 38)]
        n = rng.choice([1, 5, 20, 60, 200])
        options = SampleOptions(num_samples=1, max_new_tokens=n, temperature=1, top_k=0, seed=seed)
        text = "".join(stream_text(decoder, loaded.tokenizer, prompt, options, 0))
        asked = {"model": "out", "prompt": prompt, "max_tokens": n, "seed": seed}
        found.append((asked, text.removeprefix(prompt)))
    return found


class Client:
    """Asks until the time is up, and hangs up in the middle of one text in ten."""

    def __init__(self, url: str, number: int, asked: list, counts: dict):
        self.api = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        self.rng, self.asked, self.counts = random.Random(number), asked, counts

    async def run(self, deadline: float) -> None:
        async with self.api:
            while time.monotonic() < deadline:
                try:
                    self.counts[await self.ask()] += 1
                except openai.RateLimitError:
                    self.counts["429"] += 1
                    await asyncio.sleep(self.rng.random())

    async def ask(self) -> str:
        request, answer = self.rng.choice(self.asked)
        if self.rng.random() < 0.5:
            whole = await self.api.completions.create(**request)
            text = whole.choices[0].text
        else:
            text, hangs_up = "", self.rng.random() < 0.2
            async with await self.api.completions.create(**request, stream=True) as chunks:
                async for chunk in chunks:
                    text += chunk.choices[0].text
                    if hangs_up:
                        return "hung up"
        return "right" if text == answer else "wrong"


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def load(url: str, pid: int, asked: list) -> tuple[dict, list[float]]:
    """-> how often each outcome was seen, and the server's memory over the time."""
    counts = dict.fromkeys(("right", "wrong", "hung up", "429"), 0)
    deadline = time.monotonic() + SECONDS
    clients = [Client(url, i, asked, counts).run(deadline) for i in range(N_CLIENTS)]
    everyone, memory = asyncio.gather(*clients), []
    while not everyone.done():
        await asyncio.sleep(SECONDS / 20)
        memory.append(resident_mb(pid))
    await everyone
    return counts, memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_many_clients(tiny, call):
    assert call("train", *TINY)[0] == 0
    asked = requests_with_answers()
    line = command_line("serve", "--port=0", "--dtype=float32", "--max_waiting=24")
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().split()[0]
        counts, memory = asyncio.run(load(f"{url}/v1", server.pid, asked))
        server.send_signal(signal.SIGTERM)
    print(counts, [round(mb) for mb in memory])
    assert counts["right"] > 100 and counts["hung up"] > 5 and counts["429"] > 5
    assert counts["wrong"] == 0
    assert memory[-1] < 1.03 * memory[len(memory) // 4], "it grows"
    assert server.returncode == -signal.SIGTERM or server.returncode == 0
