"""Learning from another model's probabilities, beside the text. Hinton et al. 2015."""

import torch

from model import cross_entropy
from quill.data.dataset import IGNORE_INDEX
from quill.errors import InputError, blames_input
from quill.files import split_folders
from quill.interop import ensemble
from quill.interop.start import lies_in
from quill.training import checks, distributed
from quill.training.splits import Splits


class Teacher:
    """The best model of a run, or the mean of several, whose probabilities are learned."""

    def __init__(self, names: str, weight: float, config, data: Splits, device: torch.device):
        """names: of the runs' folders; weight: that of the teacher in the loss, 0 to 1.

        Raises InputError for a teacher that cannot read the run's windows, or lies in its folder.
        """
        self.weight, self.vocab_size = weight, data.tokenizer.vocab_size
        if any(lies_in(str(folder), config.out_dir) for folder in split_folders(names)):
            raise InputError(
                f"out_dir={config.out_dir} is a teacher's (distill_from): choose another folder"
            )
        with blames_input("distill_from", InputError):
            loaded = ensemble.from_folders(names)
        checks.check_tokenizer(config.dataset, data, loaded, names)
        if distributed.is_main():
            checks.note_replaced_text(config.dataset, data, loaded, names)
        self.model = loaded.build().eval().to(device)
        longest = self.model.config.block_size
        if longest < config.block_size:
            raise InputError(
                f"distill_from={names} has a block_size of {longest}, shorter than this run's "
                f"{config.block_size}"
            )

    def loss_sum(self, logits, idx, targets):
        """Of the student's logits (B, T, V), in nats, summed over the targets that count.

        The cross-entropy with the text and, for a part of `weight`, that with the teacher.
        """
        with torch.no_grad():
            taught = self.model(idx)[0][..., : self.vocab_size].float().softmax(dim=-1)
        log_probs = logits.float().log_softmax(dim=-1)[..., : self.vocab_size]
        from_teacher = -((taught * log_probs).sum(dim=-1) * (targets != IGNORE_INDEX)).sum()
        from_text = cross_entropy(logits, targets, "sum")
        return (1 - self.weight) * from_text + self.weight * from_teacher
