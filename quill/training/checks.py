"""What cannot work is refused before a run starts, with every reason at once."""

import shlex
from pathlib import Path

import torch

from quill.data import problems, tokenizers
from quill.errors import InputError, blames_input, print_note
from quill.training import devices, distributed
from quill.training.checkpoint import LATEST, differences
from quill.training.models import BigramConfig, config_from_dict, config_to_dict, count_parameters


def check_processes(config, device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError with every option that several processes do not support."""
    n = distributed.world_size()
    if n == 1:
        return
    wrong = []
    if config.gradient_accumulation_steps % n and config.batch_size % n:
        wrong.append(
            f"neither gradient_accumulation_steps={config.gradient_accumulation_steps} nor "
            f"batch_size={config.batch_size} can be divided by {n} processes"
        )
    if device.type == "mps":
        wrong.append("several processes need CUDA devices or CPUs")
    if config.parallel == "fsdp":
        if config.lora_rank:
            wrong.append("parallel=fsdp shards no adapters: take lora_rank=0 or parallel=ddp")
        if config.optimizer == "muon":
            wrong.append("Muon needs whole matrices: take optimizer=adamw or parallel=ddp")
        if config.sample_at_eval:
            wrong.append("sample_at_eval needs all of the model in one process: parallel=ddp")
        if dtype == torch.float16:
            wrong.append("parallel=fsdp has no loss scaling: take bfloat16 or float32")
        if device.type == "cuda" and config.backend == "gloo":  # which crashes in PyTorch 2.11
            wrong.append("parallel=fsdp on GPUs needs backend=nccl")
    if wrong:
        raise InputError("; ".join(wrong))


def pick_cuda_graph(setting: bool | str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to record steps; `auto` does where it is possible. Raises InputError where not.

    Loss scaling (float16) looks at the gradients in each step, and processes wait for each other.
    """
    is_one = distributed.world_size() == 1
    is_possible = device.type == "cuda" and dtype != torch.float16 and is_one
    if setting is True and not is_possible:
        raise InputError("cuda_graph=true: only on CUDA, by one process, and not in float16")
    return is_possible and bool(setting)


def check_lora(rank: int, model_config, has_weights: bool) -> None:
    """Raises InputError where there is nothing to adapt, or where adapters would be no smaller."""
    if isinstance(model_config, BigramConfig):
        raise InputError("lora_rank: a bigram has no blocks to adapt; leave it out")
    if rank > model_config.n_embd:
        raise InputError(f"lora_rank={rank} is above n_embd={model_config.n_embd}: lower it")
    if not has_weights:
        raise InputError("lora_rank trains adapters of given weights: give --init_from=DIR as well")


def check_resume(config, data, model_config, saved: dict) -> None:
    """Raises InputError with every difference that makes the checkpoint unusable.

    model_config: what the options say; None where they say nothing of the model.
    """
    path = Path(config.out_dir, LATEST)
    defaults = {"optimizer": "", "lora_rank": 0}  # which RewardConfig lacks
    then = {name: saved["config"].get(name, value) for name, value in defaults.items()}
    now = {name: getattr(config, name, value) for name, value in defaults.items()}
    if model_config is not None:
        kinds = ValueError, TypeError, LookupError
        with blames_input(f"{path} is not usable for a resume", *kinds):
            then |= config_to_dict(config_from_dict(saved["model_config"]))
        now |= config_to_dict(model_config)
    free = {"dropout", "init_std"}
    if then.get("model") != now.get("model"):  # a bigram has none of a GPT's other options
        free |= now.keys() - {"model"}
    different = differences(then, now, free)
    tokenizer = tokenizers.from_json(saved["tokenizer"], str(path))
    changed = []
    if tokenizer.to_json() != data.tokenizer.to_json():
        changed.append("another tokenizer")
    if saved.get("text_sha256") != data.meta.sha256:
        changed.append("another text")
    if changed:
        different.append(f"dataset {config.dataset!r} has {' and '.join(changed)}")
    if different:
        ways_out = [way_to_dataset(saved, path.parent, config.dataset)] if changed else []
        if not changed or differences(then, now, free | {"vocab_size"}):
            ways_out.append("leave these options out")
        raise InputError(
            f"{path} cannot be resumed: {', '.join(different)}; {' and '.join(ways_out)}, or start "
            "a new run in another --out_dir"
        )
    if saved["step"] > config.max_iters:
        raise InputError(f"max_iters={config.max_iters} lies before step {saved['step']} of {path}")


def check_made_of(config, made_of: dict[str, str], saved: dict) -> dict[str, str]:
    """-> all that the checkpoint's run was made of: digests, by the options that name the files.

    Raises InputError where one of `made_of`, the present files, is another one.
    """
    then = saved.get("made_of", made_of)  # which older checkpoints lack
    then = then if isinstance(then, dict) else {}
    changed = [
        f"{name}={getattr(config, name)}"
        for name, digest in made_of.items()
        if then.get(name) != digest
    ]
    if changed:
        raise InputError(
            f"{config.out_dir} cannot be resumed: {' and '.join(changed)} is not what the run "
            "began with; put that back, or start a new run in another --out_dir"
        )
    return then


def way_to_dataset(saved: dict, out_dir: Path, now_named: str) -> str:
    """How to have the dataset that the checkpoint was trained on, in words."""
    name = saved["config"].get("dataset")
    if name != now_named:
        return f"leave --dataset out (the run's is {name!r})"
    if name in problems.CHARS:
        return f"prepare the run's again (python prepare.py {name} --overwrite=true)"
    source, sha256 = saved.get("text_source", "unknown"), str(saved.get("text_sha256"))
    return (
        f"prepare the run's again (python prepare.py {name} --input=TEXT "
        f"--tokenizer={shlex.quote(str(out_dir))} --overwrite=true; its TEXT was {source}, of the "
        f"SHA-256 {sha256[:12]}...)"
    )


def check_tokenizer(dataset: str, data, loaded, name: str) -> None:
    """Raises InputError when the weights, loaded from `name`, are for another tokenizer."""
    if loaded.tokenizer is not None and loaded.tokenizer.to_json() != data.tokenizer.to_json():
        raise InputError(
            f"dataset {dataset!r} has another tokenizer than {name}: "
            "prepare it with that one, by --tokenizer"
        )
    if data.meta.vocab_size > loaded.config.vocab_size:
        raise InputError(
            f"dataset {dataset!r} has {data.meta.vocab_size:,} tokens, more than the "
            f"{loaded.config.vocab_size:,} of {name}"
        )


def note_replaced_text(dataset: str, data, loaded, name: str) -> None:
    """Say it on stderr where the dataset has not the text any more that `name` was trained on.

    Of an ensemble, each member that this is so for is named.
    """
    for part_name, part in loaded.parts(name):
        if part.dataset == dataset and part.text_sha256 not in (None, data.meta.sha256):
            print_note(
                f"dataset {dataset!r} has another text now than when {part_name} was trained on it"
            )


def check_memory(model_config, device: torch.device) -> None:
    """Raises InputError for a model that this machine cannot hold, before it is allocated."""
    sizes = f"a vocabulary of {model_config.vocab_size:,}"
    if not isinstance(model_config, BigramConfig):
        sizes = f"n_layer={model_config.n_layer}, n_embd={model_config.n_embd} and {sizes}"
    devices.refuse_larger_than_memory(count_parameters(model_config), sizes, device)
