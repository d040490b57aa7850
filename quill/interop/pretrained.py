"""Weights to start from or to sample: GPT-2's own, Hugging Face's, nanoGPT's, another run's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from model import GPT, Bigram, GPTConfig, build
from quill.data import tokenizers
from quill.data.download import download
from quill.errors import InputError
from quill.files import sha256_of_file
from quill.training import checkpoint


class Release(NamedTuple):
    """A model.safetensors of https://huggingface.co/openai-community, pinned."""

    revision: str
    n_bytes: int
    sha256: str


RELEASES = {
    "gpt2": Release(
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        548_105_171,
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": Release(
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        1_519_984_962,
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    ),
    "gpt2-large": Release(
        "32b71b12589c2f8d625668d2335a01cac3249519",
        3_247_159_078,
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    ),
    "gpt2-xl": Release(
        "15ea56dee5df4983c59b2538573817e1667135e2",
        6_431_829_964,
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}
URL = "https://huggingface.co/openai-community/{name}/resolve/{revision}/model.safetensors"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    config: GPTConfig
    weights: dict[str, torch.Tensor]  # the state_dict of a GPT(config), in float32
    tokenizer: tokenizers.Tokenizer | None  # where it came with one

    def build(self) -> GPT | Bigram:
        model = build(self.config)
        model.load_state_dict(self.weights)
        return model

    def options(self) -> dict:
        """The train.py options that such a model has."""
        options = dataclasses.asdict(self.config)
        del options["dropout"]  # a run's choice
        return options | {"vocab_multiple": options.pop("vocab_size")}

    def fitted(self, config: GPTConfig) -> dict[str, torch.Tensor]:
        """The weights for a model of `config`: its context may be shorter, its vocabulary padded.

        Raises InputError naming every other difference.
        """
        own, wanted = dataclasses.asdict(self.config), dataclasses.asdict(config)
        free = {"dropout", "init_std", "residual_init", "block_size"}
        free |= {"vocab_size"} if config.model == "gpt" else set()  # a bigram's table is not padded
        different = checkpoint.differences(own, wanted, free)
        if config.position == "learned" and config.block_size > self.config.block_size:
            different.append(f"block_size is at most {self.config.block_size} there")
        if config.vocab_size < self.config.vocab_size:
            different.append(f"its vocabulary has {self.config.vocab_size:,} tokens")
        if different:
            raise InputError(f"init_from: {', '.join(different)}; leave these options out")
        weights = dict(self.weights)
        if config.model == "bigram":
            return weights
        if config.position == "learned":
            wpe = weights["transformer.wpe.weight"]
            weights["transformer.wpe.weight"] = wpe[: config.block_size]
        for name in ("transformer.wte.weight", "lm_head.weight"):
            # A mean row scores like a mean token, which is next to nothing beside the likely ones.
            if n_more := config.vocab_size - len(weights[name]):
                rows = weights[name].mean(dim=0, keepdim=True).expand(n_more, -1)
                weights[name] = torch.cat((weights[name], rows))
        return weights


def load(source: str) -> Pretrained:
    """source: a name of `RELEASES`, a run's folder or checkpoint, one of nanoGPT, or a folder or
    .safetensors file of Hugging Face's GPT-2. Raises InputError when it is none of these.
    """
    from quill.interop import (
        huggingface,
        nanogpt,  # both know `Pretrained`
    )

    if source in RELEASES:
        huggingface.import_safetensors()  # before it is waited for
        tokenizer = tokenizers.BPETokenizer.gpt2()
        return dataclasses.replace(huggingface.load(_released(source)), tokenizer=tokenizer)
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"{source}: there is no such file or folder of weights, and it is none of "
            f"{', '.join(RELEASES)}"
        )
    if path.suffix == ".safetensors" or any(path.glob("*.safetensors")):
        return huggingface.load(path)
    if path.is_dir():
        path = checkpoint.find(path)
        if not path.exists():
            raise InputError(f"{source} holds neither {path.name} nor a .safetensors file")
    if not checkpoint.is_sealed(path):
        return nanogpt.load_checkpoint(path)
    return from_run(path)


def from_folder(out_dir: Path) -> Pretrained:
    """A run's best weights, or else its latest."""
    return from_run(checkpoint.find(out_dir))


def from_run(path: Path) -> Pretrained:
    """What a checkpoint of Quill holds; raises InputError when it is missing or not usable."""
    contents = checkpoint.load(path)
    try:
        config = GPTConfig(**contents["model_config"])
        checkpoint.check_weights(config, contents["model"])
    except checkpoint.MISFITS as error:
        raise InputError(f"{path}: its weights and its model config disagree: {error}") from None
    tokenizer = tokenizers.from_json(contents["tokenizer"], str(path))
    return Pretrained(config, contents["model"], tokenizer)


def _released(name: str) -> Path:
    """The downloaded file, in a folder of its own: what lies beside it would be read, too."""
    release, path = RELEASES[name], Path("data", "openai-community", name, "model.safetensors")
    if path.exists():
        if sha256_of_file(path) == release.sha256:
            return path
        raise InputError(f"{path} is not the {name} that was released: remove it")
    url = URL.format(name=name, revision=release.revision)
    advice = f"run the same command again, which goes on from there, or put the file at {path}"
    download((url,), path, release.n_bytes, release.sha256, advice)
    return path
