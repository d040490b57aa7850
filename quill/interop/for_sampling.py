"""Weights and a tokenizer, as the options of sample.py and quill.serve name them."""

from quill.data import dataset_files, tokenizers
from quill.data.tokenizers import Tokenizer
from quill.errors import InputError
from quill.files import dataset_folder
from quill.interop import ensemble, pretrained
from quill.interop.pretrained import Pretrained

# Defaults and helps of the options that name them.
OUT_DIR = (
    "out",
    "the run's folder: its best.pt is used, else its ckpt.pt; a,b,c: the mean of several",
)
INIT_FROM = (
    "resume",
    "resume: out_dir's; gpt2, gpt2-medium, gpt2-large, gpt2-xl; or a path to weights",
)
DATASET = "", "take data/<dataset>'s tokenizer, for weights without one"


def load_for_sampling(config) -> tuple[Pretrained, Tokenizer]:
    """-> the weights, and the tokenizer that they came with, or else that of a dataset.

    config: has sample.py's options out_dir, init_from and dataset. Raises InputError where they do
    not fit together.
    """
    given = None
    if config.dataset:
        path = dataset_folder(config.dataset) / "meta.json"
        given = tokenizers.from_json(dataset_files.read_meta(path).tokenizer, str(path))
    if config.init_from == "resume":
        loaded = ensemble.from_folders(config.out_dir)
    else:
        loaded = pretrained.load(config.init_from)
    if loaded.tokenizer is not None and given is not None:
        raise InputError(f"dataset={config.dataset}: the model came with a tokenizer; leave it out")
    tokenizer = loaded.tokenizer or given
    if tokenizer is None:
        raise InputError(
            f"{config.init_from} comes without a tokenizer: give --dataset=NAME, one that was "
            "prepared with the same"
        )
    if tokenizer.vocab_size > loaded.config.vocab_size:
        owner = f"dataset {config.dataset!r}"
        if given is None:
            name = config.out_dir if config.init_from == "resume" else config.init_from
            owner = f"{name}: its tokenizer"
        raise InputError(
            f"{owner} has {tokenizer.vocab_size:,} tokens, more than the "
            f"{loaded.config.vocab_size:,} of the model, which was trained with another"
        )
    return loaded, tokenizer
