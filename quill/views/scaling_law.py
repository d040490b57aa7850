"""A scaling law fitted to finished runs, its uncertainty, and its picture. No torch is needed.

The law is Hoffmann et al.'s, 2022, their third approach: loss = E + A / N^alpha + B / D^beta for N
parameters and D tokens.
"""

import contextlib
import dataclasses

import numpy as np

GRID = np.linspace(0.05, 1.2, 47)  # of alpha, and of beta


@dataclasses.dataclass(frozen=True)
class Run:
    budget: float  # operations
    n_parameters: int
    n_tokens: int
    val_loss: float


@dataclasses.dataclass(frozen=True)
class Law:
    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, n_parameters, n_tokens):
        return self.e + self.a * n_parameters**-self.alpha + self.b * n_tokens**-self.beta

    @property
    def size_exponent(self) -> float:
        """The best number of parameters grows with this power of the budget."""
        return self.beta / (self.alpha + self.beta)


def fit(runs: list[Run]) -> Law:
    """The least squares of the loss: by trying exponents, for each of which the rest is linear.

    Raises ValueError for fewer runs than the law has numbers.
    """
    if len(runs) < 6:
        raise ValueError(f"{len(runs)} runs are too few for a law of five numbers")
    n = np.array([run.n_parameters for run in runs], dtype=float)
    d = np.array([run.n_tokens for run in runs], dtype=float)
    losses = np.array([run.val_loss for run in runs])
    best, least = None, np.inf
    for alpha in GRID:
        for beta in GRID:
            terms = np.stack((np.ones_like(n), (n / n[0]) ** -alpha, (d / d[0]) ** -beta), axis=1)
            factors, *_ = np.linalg.lstsq(terms, losses, rcond=None)
            error = float(((terms @ factors - losses) ** 2).sum())
            if error < least and (factors >= 0).all():
                least = error
                e, a, b = factors.tolist()
                best = Law(e, a * n[0] ** alpha, b * d[0] ** beta, float(alpha), float(beta))
    if best is None:
        raise ValueError("no law of this form fits: give larger budgets, or a longer text")
    return best


def bootstrap(runs: list[Run], n_times: int = 200, seed: int = 0) -> list[Law]:
    """Laws fitted to as many runs, drawn anew with replacement; draws that none fits are left out.

    Raises ValueError when none fits half of the draws.
    """
    rng = np.random.default_rng(seed)
    laws = []
    for _ in range(n_times):
        drawn = [runs[i] for i in rng.integers(0, len(runs), len(runs))]
        if len({run.n_parameters for run in drawn}) > 2 and len({run.budget for run in drawn}) > 1:
            with contextlib.suppress(ValueError):
                laws.append(fit(drawn))
    if 2 * len(laws) < n_times:
        raise ValueError("the law depends on single runs: give more seeds, or larger budgets")
    return laws


def interval(values) -> tuple[float, float]:
    """Nine of ten values lie in it."""
    low, high = np.quantile([*values], (0.05, 0.95)).tolist()
    return low, high


def describe(law: Law, others: list[Law]) -> list[str]:
    """others: of a bootstrap."""
    lines = [
        f"loss = {law.e:.3f} + {law.a:.3g} / N^{law.alpha:.3f} + {law.b:.3g} / D^{law.beta:.3f}"
    ]
    for name in ("alpha", "beta", "size_exponent"):
        low, high = interval(getattr(other, name) for other in others)
        lines.append(
            f"{name.replace('_', ' ')}: {getattr(law, name):.3f} ({low:.3f} to {high:.3f})"
        )
    return lines


def draw(runs: list[Run], law: Law):
    """A figure of the val losses over the size, a colour for each budget, with the law's curves."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    budgets = sorted({run.budget for run in runs})
    for i, budget in enumerate(budgets):
        color = colormaps["viridis"](0.8 * i / max(1, len(budgets) - 1))
        own = sorted(
            (run.n_parameters, run.n_tokens, run.val_loss) for run in runs if run.budget == budget
        )
        n, d, losses = (np.array(column, dtype=float) for column in zip(*own, strict=True))
        axes.plot(n, losses, "o", color=color, label=f"{budget:.2g} operations")
        sizes, where = np.unique(n, return_index=True)
        axes.plot(sizes, law.loss(sizes, d[where]), color=color)
    axes.set(xscale="log", xlabel="parameters", ylabel="val loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    return figure
