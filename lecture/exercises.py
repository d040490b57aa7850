"""The lecture's steps as functions to fill in, in its order.

Put your own code where it says `raise NotImplementedError`, then run

    python -m pytest lecture              # which are right, and what is wrong with the others
    python -m pytest lecture -k average   # only those with "average" in their names

Begin anywhere. An answer may call an earlier one. spelled_out.py explains the ideas and has the
solutions, in the same order.

Shapes:  B batch   T time, in tokens   C n_embd   hs head size   V vocab_size   N any number
"""

# ruff: noqa: F401
import math

import torch
from torch.nn import functional as F

BATCH_SIZE, BLOCK_SIZE = 32, 8  # as in spelled_out.py


# ---- 0:09:28 tokenization, train/val split -------------------------------------------------------


def vocabulary(text: str) -> list[str]:
    """The characters that occur in the text, each once, in sorted order."""
    raise NotImplementedError


def encode(text: str, chars: list[str]) -> list[int]:
    """The id of each character of the text: its place in chars, a vocabulary as above."""
    raise NotImplementedError


def decode(ids: list[int], chars: list[str]) -> str:
    """The text that was encoded as these ids."""
    raise NotImplementedError


def split(ids):
    """ids (N,) -> the first 90 % of them, to train on, and the other 10 %, to validate with."""
    raise NotImplementedError


# ---- 0:14:27 batches of chunks of data -----------------------------------------------------------


def get_batch(ids):
    """ids (N,) -> x and y, (BATCH_SIZE, BLOCK_SIZE) each.

    A row of x is a piece of the ids that begins at a random place; every place from which x and y
    can be filled should have the same chance. y has, for each token of x, the token that follows.
    """
    raise NotImplementedError


# ---- 0:22:11 simplest baseline: bigram, loss, generation -----------------------------------------


def bigram_logits(idx, table):
    """idx (B, T), table (V, V) -> logits (B, T, V).

    Row i of the table holds the logits of what follows token i.
    """
    raise NotImplementedError


def cross_entropy(logits, targets):
    """logits (N, V), targets (N,) -> the mean of -log p(target), one number; without F's.

    p is the softmax of a row of logits. Logits of 1000 should give the right number too, although
    exp(1000) is infinite in float32.
    """
    raise NotImplementedError


def generate(model, idx, n_tokens: int):
    """idx (B, T) -> (B, T + n_tokens): each row goes on with n_tokens new tokens, one at a time.

    model(idx) is (B, T, V), the logits of what follows each token. It takes at most BLOCK_SIZE
    tokens: give it the last ones. Draw each new token at random, from the softmax of the logits.
    """
    raise NotImplementedError


# ---- 0:34:53 training the bigram model -----------------------------------------------------------


def train_step(model, optimizer, idx, targets):
    """One update of the model's weights; -> the loss before it.

    idx and targets are (B, T), model(idx) is (B, T, V). The optimizer is one of torch.optim.
    """
    raise NotImplementedError


# ---- 0:42:13 to 0:54:42 averaging the past, in three equivalent ways -----------------------------


def average_with_loops(x):
    """x (B, T, C) -> (B, T, C): at each time t the mean of x at the times 0 to t, t included.

    Version 1: a loop over the rows of the batch, and in it a loop over the times.
    """
    raise NotImplementedError


def average_with_matrix(x):
    """The same as a product of matrices, (T, T) @ (B, T, C) -> (B, T, C).

    Version 2, at 0:51:54: row t of the first one has the weights with which time t takes from each
    time. Begin with a lower triangle of ones.
    """
    raise NotImplementedError


def average_with_softmax(x):
    """The same once more, with weights that come out of a softmax.

    Version 3: begin with scores of zero, (T, T), and set those of the future to minus infinity.
    """
    raise NotImplementedError


# ---- 1:02:00 self-attention, 1:16:56 and why it is scaled ----------------------------------------


def attention_weights(q, k):
    """Queries and keys, (B, T, hs) each -> (B, T, T): how much row t takes from each time.

    The score of a query and a key is their dot product, divided by the square root of hs. Nothing
    is taken from the future, and each row sums to 1.
    """
    raise NotImplementedError


def head(x, query, key, value):
    """x (B, T, C) -> (B, T, hs): one head of self-attention.

    query, key and value are nn.Linear layers from C to hs: query(x) is (B, T, hs).
    """
    raise NotImplementedError


# ---- 1:21:59 several heads -----------------------------------------------------------------------


def multi_head(x, heads):
    """x (B, T, C), a list of nh heads -> (B, T, nh * hs): what they find, side by side.

    heads[0](x) is (B, T, hs).
    """
    raise NotImplementedError


# ---- 1:24:25 feed-forward ------------------------------------------------------------------------


def feed_forward(x, expand, project):
    """x (B, T, C) -> (B, T, C): two linear layers with ReLU between them.

    expand(x) is (B, T, 4 * C), and project leads back to C.
    """
    raise NotImplementedError


# ---- 1:32:51 layer norm, and with it the residual block of 1:26:48 -------------------------------


def layer_norm(x, gain, bias):
    """x (B, T, C), gain and bias (C,) -> (B, T, C).

    Scale the C numbers of each token to mean 0 and variance 1, then multiply by the gain and add
    the bias. Add 1e-5 to the variance before its root is taken, against a division by zero.
    """
    raise NotImplementedError


def block(x, attention, feed_forward, norm_1, norm_2):
    """x (B, T, C) -> (B, T, C): attention, then feed-forward, each added to its own input.

    Each branch reads a normalised copy: norm_1 is for attention and norm_2 for feed-forward. All
    four take and return (B, T, C).
    """
    raise NotImplementedError


# ---- 1:37:49 dropout -----------------------------------------------------------------------------


def dropout(x, p: float, training: bool):
    """x of any shape -> the same shape, in training with each number set to 0 with probability p.

    Scale up the others, so that the expected value of each number stays what it was. Out of
    training x stays as it is.
    """
    raise NotImplementedError
