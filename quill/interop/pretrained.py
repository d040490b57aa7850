"""Any weights to start from or to sample: another run's, nanoGPT's, Hugging Face's, a release's."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from model import GPTConfig
from quill.data.download import download
from quill.data.problems import reverses_answers
from quill.data.tokenizers import BPETokenizer, Tokenizer, from_json
from quill.errors import InputError, blames_input
from quill.files import sha256_of_file
from quill.interop import huggingface
from quill.training import checkpoint, lora, models
from quill.training.models import BigramConfig


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
    config: GPTConfig | BigramConfig
    weights: dict[str, torch.Tensor]  # the state_dict of a model of this config, in float32
    tokenizer: Tokenizer | None  # None where the source has none
    reverses_answers: bool = False  # see quill.data.problems
    dataset: str | None = None  # that they were trained on, by name, where the source says it
    text_sha256: str | None = None  # of that dataset's text

    def build(self) -> nn.Module:
        with models.SkipInit():
            model = models.build(self.config)
        model.load_state_dict(self.weights)
        return model

    def parts(self, name: str) -> list[tuple[str, "Pretrained"]]:
        """Itself, loaded from `name`; the members of an ensemble, each with its own name."""
        return [(name, self)]

    def options(self) -> dict:
        """The train.py options that give such a model."""
        options = models.config_to_dict(self.config)
        options.pop("dropout", None)  # a choice of each run
        options["vocab_multiple"] = options.pop("vocab_size")  # pads the dataset's to this
        return options

    def fitted(self, config: GPTConfig | BigramConfig) -> dict[str, torch.Tensor]:
        """The weights for a model of `config`: its context may be shorter, its vocabulary padded.

        Raises InputError naming every other difference.
        """
        own, wanted = models.config_to_dict(self.config), models.config_to_dict(config)
        is_gpt = isinstance(config, GPTConfig)
        free = {"dropout", "init_std", "residual_init", "block_size"}
        if is_gpt:  # a bigram's table is not padded
            free.add("vocab_size")
        if own["model"] != wanted["model"]:
            free = wanted.keys() - {"model"}
        different = checkpoint.differences(own, wanted, free)
        if "transformer.wpe.weight" in self.weights and config.block_size > self.config.block_size:
            different.append(f"block_size is at most {self.config.block_size} there")
        if config.vocab_size < self.config.vocab_size:
            different.append(f"its vocabulary has {self.config.vocab_size:,} tokens")
        if different:
            raise InputError(f"init_from: {', '.join(different)}; leave these options out")
        return resized(self.weights, config) if is_gpt else dict(self.weights)


def resized(weights: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """A GPT's weights with the first positions that `config` has, and rows for padding tokens."""
    weights = dict(weights)
    if config.position == "learned":
        wpe = weights["transformer.wpe.weight"]
        weights["transformer.wpe.weight"] = wpe[: config.block_size]
    for name in ("transformer.wte.weight", "lm_head.weight"):
        # A mean row gives a token the mean score, which is tiny beside those of the likely tokens.
        if n_more := config.vocab_size - len(weights[name]):
            rows = weights[name].mean(dim=0, keepdim=True).expand(n_more, -1)
            weights[name] = torch.cat((weights[name], rows))
    return weights


def load(source: str) -> Pretrained:
    """source: a name in `RELEASES`, the folder or checkpoint of a run of Quill or nanoGPT, or a
    folder or .safetensors file of Hugging Face's GPT-2. Raises InputError when it is none of these.
    """
    if source in RELEASES:
        huggingface.import_safetensors()  # fails before the download, not after it
        tokenizer = BPETokenizer.gpt2()
        config, weights, _ = huggingface.load(_released(source))
        return Pretrained(config, weights, tokenizer)
    path = Path(source)
    if not path.exists():
        names = ", ".join(RELEASES)
        raise InputError(f"{source}: there is no such file or folder of weights; or use {names}")
    if path.suffix == ".safetensors" or any(path.glob("*.safetensors")):
        return Pretrained(*huggingface.load(path))
    if path.is_dir():
        path = checkpoint.find_checkpoint(path)
        if not path.exists():
            raise InputError(f"{source} holds neither {path.name} nor a .safetensors file")
    return from_run(path) if checkpoint.has_checksum(path) else from_nanogpt(path)


def from_folder(out_dir: Path) -> Pretrained:
    """A run's best weights, or its latest where there are none."""
    return from_run(checkpoint.find_checkpoint(out_dir))


def from_run(path: Path) -> Pretrained:
    """A checkpoint of Quill; raises InputError when it is missing or not usable."""
    contents = checkpoint.load_checkpoint(path)
    kind = contents["model_config"].get("model", "gpt")
    if kind not in models.KINDS:
        raise InputError(f"{path} holds a model of kind {kind!r:.100}, which predicts no tokens")
    with blames_input(
        f"{path}: its weights and its model config disagree", *checkpoint.LOAD_ERRORS
    ):
        config = models.config_from_dict(contents["model_config"])
        weights = lora.merged(contents["model"])
        models.check_weights(config, weights)
    spec = contents["tokenizer"]
    tokenizer = from_json(spec, str(path))
    dataset = contents["config"].get("dataset")
    dataset = dataset if isinstance(dataset, str) else None
    text = contents.get("text_sha256")
    return Pretrained(config, weights, tokenizer, reverses_answers(spec), dataset, text)


def from_nanogpt(path: Path) -> Pretrained:
    """A checkpoint of nanoGPT's train.py; raises InputError when it is not one."""
    contents = checkpoint.read_archive(path, ("model", "optimizer", "best_val_loss"))
    try:
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
        config = GPTConfig(**{name: contents["model_args"][name] for name in names})
        weights = {
            name.removeprefix("_orig_mod."): p.float()  # torch.compile's prefix
            for name, p in contents["model"].items()
            if not name.endswith(".attn.bias")  # a mask, in attention without a fused kernel
        }
        models.check_weights(config, weights)
    except checkpoint.LOAD_ERRORS as error:
        raise InputError(f"{path} is no checkpoint of Quill or nanoGPT ({error!r})") from None
    return Pretrained(config, weights, tokenizer=None)


def _released(name: str) -> Path:
    """The downloaded file, in a folder of its own: files beside it would be read as well."""
    release, path = RELEASES[name], Path("data", "openai-community", name, "model.safetensors")
    if not path.exists():
        url = URL.format(name=name, revision=release.revision)
        advice = f"run the same command again to continue the download, or put the file at {path}"
        download((url,), path, release.n_bytes, release.sha256, advice)
    elif sha256_of_file(path) != release.sha256:
        raise InputError(f"{path} is not the {name} that was released: remove it")
    return path
