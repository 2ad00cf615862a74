"""Measures how many negatives a gradient with differentiated weights pulls nearer to the query.

The simulation alone takes half a minute:

    python -m experiments.studies.gradient_question --out=experiments/results

The same with the test embeddings of a trained network:

    python -m experiments.studies.gradient_question --out=DIR --workdir=runs/emoji

The slope of a pair is dL_i / dd_ij, the derivative of query i's loss by its distance to j. A
descent step brings a pair nearer where its slope is above 0, which is wrong for a negative.
In the published gradient the weights are constants: the slope of an active negative is minus its
share of the weight, never above 0. With differentiated weights, as in pytorch-metric-learning 2.9,
the slope is -p_ij (1 + T (h_ij - L_i)), which is above 0 for every negative whose hinge h is more
than 1 / T below the weighted mean L_i.

The slopes measured here do not come from that formula but from gradients of `rll_jax.loss`. The
command writes gradient_question.md, .json and .png into --out.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
import pathlib
import sys
from typing import Any, TypeVar

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments.engine import (
    checks,
    command,
    datasets,
    record,
    scoring,
    trained_network,
)
from experiments.studies import gradient_question_page as page
from rll_jax import loss

_Number = TypeVar("_Number", int, float)


@functools.partial(jax.jit, static_argnames="weight_gradient")
def slopes(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    alpha: float,
    temperature: float,
    *,
    weight_gradient: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the slopes of all pairs and which pairs are active negatives.

    The loss depends on distances alone. So each query is put at 0 and its gallery on the axes, at
    the same distances. The gradient of the query, which is the one that trains it, then has minus
    the slope of a pair in the coordinate of that pair.

    Args:
      embeddings: (N, D) floating, of unit length.
      labels: (N,) integer classes.
      alpha: the negatives' boundary.
      temperature: T_n of the negatives' weights.
      weight_gradient: whether the weights are differentiated.

    Returns:
      slopes: (N, N) dL_i / dd_ij, query i in row i.
      active: (N, N) bool, the negatives that are nearer than alpha.
    """
    d2 = 2 - 2 * jnp.matmul(embeddings, embeddings.T, precision=jax.lax.Precision.HIGHEST)
    others = ~jnp.eye(len(labels), dtype=bool)
    # A query is also in its own gallery: a positive at distance 0, which is trivial.
    distances = jnp.sqrt(jnp.maximum(d2, 0)) * others

    def slopes_of_query(query: tuple[jax.Array, jax.Array]) -> jax.Array:
        distances, label = query

        def query_loss(position: jax.Array) -> jax.Array:
            return loss.ranked_list_loss(
                position,
                label[None],
                gallery=jnp.diag(distances),
                gallery_labels=labels,
                alpha=alpha,
                temperature_neg=temperature,
                weight_gradient=weight_gradient,
                normalize=False,
            )

        return -jax.grad(query_loss)(jnp.zeros((1, len(labels)), distances.dtype))[0]

    active = (labels[:, None] != labels[None, :]) & (distances < alpha)
    return jax.lax.map(slopes_of_query, (distances, labels)), active


def shares(
    batches: np.ndarray,
    labels: np.ndarray,
    alpha: float,
    temperature: float,
    *,
    weight_gradient: bool,
) -> page.Shares:
    """Returns which shares of the active negatives are pulled nearer, means over the batches.

    Args:
      batches: (B, N, D) embeddings of unit length.
      labels: (N,) integer classes, the same in every batch.
      alpha: the negatives' boundary.
      temperature: T_n of the negatives' weights.
      weight_gradient: whether the weights are differentiated.
    """
    rows = []
    for batch in batches:
        # The coordinates of a gradient are rounded by the largest of them: float32 has no sign
        # for weights below 1e-8.
        with jax.enable_x64(True):
            slope, active = map(
                np.asarray,
                slopes(
                    np.asarray(batch, np.float64),
                    labels,
                    alpha,
                    temperature,
                    weight_gradient=weight_gradient,
                ),
            )
        pulled = active & (slope > 0)
        pulled_by_both = active & (slope + slope.T > 0)
        count, size = active.sum(), np.abs(slope[active]).sum()
        negatives = (labels[:, None] != labels).sum()
        rows.append(
            [
                pulled.sum() / max(count, 1),
                slope[pulled].sum() / (size or 1),
                pulled_by_both.sum() / max(count, 1),
                count / negatives,
            ]
        )
    pairs, norm, both_lists, active = 100 * np.mean(rows, axis=0)
    deviation = 100 * np.std(rows, axis=0)[0]
    return {
        "pairs": pairs,
        "norm": norm,
        "both_lists": both_lists,
        "active": active,
        "std": deviation,
    }


def effective_dimension(embeddings: np.ndarray) -> float:
    """Returns the participation ratio (sum l)^2 / sum l^2 of the covariance's eigenvalues l.

    Args:
      embeddings: (N, D). The ratio is D where all eigenvalues are alike.
    """
    covariance = np.cov(np.asarray(embeddings, np.float64), rowvar=False)
    return float(np.trace(covariance) ** 2 / np.sum(covariance**2))


def simulated(rank: int, labels: np.ndarray, options: flags.FlagValues) -> np.ndarray:
    """Returns random embeddings that vary in few directions.

    The centres of the classes are normal in `rank` random directions of the embedding space. The
    examples are normal about them in the same directions, --spread times as wide.

    Args:
      rank: the number of directions.
      labels: (N,) the classes 0 to --classes - 1.
      options: the flags --batches, --classes, --embedding_dim, --spread and --seed.

    Returns:
      (--batches, N, --embedding_dim) float32, of unit length.
    """
    rng = np.random.default_rng((options.seed, rank))
    directions = rng.standard_normal((rank, options.embedding_dim))
    centres = rng.standard_normal((options.batches, options.classes, rank))[:, labels]
    noise = rng.standard_normal((options.batches, len(labels), rank))
    points = (centres + options.spread * noise) @ directions
    return (points / np.linalg.norm(points, axis=-1, keepdims=True)).astype(np.float32)


def embed_run(workdir: str, options: flags.FlagValues) -> tuple[str, np.ndarray, np.ndarray]:
    """Embeds the test images of a run with the last level of its network, and draws batches.

    Images that cannot be read are skipped and listed on stderr.

    Args:
      workdir: the folder of the run.
      options: the flags --batches, --classes, --images_per_class and --seed.

    Returns:
      title: the run, its level and its step.
      embeddings: (M, D) of all test images, of unit length.
      batches: (--batches, --classes x --images_per_class, D) of them, drawn at random.

    Raises:
      ValueError: the run cannot be used, or too few of its test classes are large enough.
    """
    trained = trained_network.load(workdir)
    splits, _ = datasets.open_usable(trained.config.data, trained.config.runtime)
    checks.check_same_data(pathlib.Path(workdir), splits)
    test = splits["test"]
    data, levels = scoring.embed_readable(
        functools.partial(trained.embed, test),
        test,
        lambda row: print(f"skipped, cannot be read: {test.paths[row]}", file=sys.stderr),
    )
    level = trained.config.network.levels[-1]
    lengths = np.linalg.norm(levels[level], axis=1, keepdims=True)
    embeddings = levels[level] / np.maximum(lengths, 1e-12)
    run = " ".join(pathlib.Path(workdir).parts[-2:])
    title = f"{trained.config.data.dataset}, {run}, level {level}, step {trained.step}"

    classes = [np.flatnonzero(data.labels == label) for label in np.unique(data.labels)]
    classes = [rows for rows in classes if len(rows) >= options.images_per_class]
    if len(classes) < options.classes:
        raise ValueError(
            f"--classes={options.classes}: found {len(classes)} test classes with "
            f"{options.images_per_class} images or more in {workdir}; lower --classes or "
            "--images_per_class"
        )
    rng, batches = np.random.default_rng(options.seed), []
    for _ in range(options.batches):
        drawn = rng.choice(len(classes), options.classes, replace=False)
        rows = [rng.choice(classes[c], options.images_per_class, replace=False) for c in drawn]
        batches.append(np.concatenate(rows))
    return title, embeddings, embeddings[np.array(batches)]


def measure(
    title: str,
    population: np.ndarray,
    batches: np.ndarray,
    labels: np.ndarray,
    temperatures: Iterable[float],
    alpha: float,
) -> page.Row:
    """Measures the shares of one kind of embeddings at all temperatures.

    Args:
      title: what the embeddings are.
      population: (M, D) the embeddings whose effective dimension and mean are measured.
      batches: (B, N, D) batches of them.
      labels: (N,) integer classes, the same in every batch.
      temperatures: values of T_n.
      alpha: the negatives' boundary.
    """

    def at_all_temperatures(weight_gradient: bool) -> dict[str, page.Shares]:
        return {
            f"{t:g}": shares(batches, labels, alpha, t, weight_gradient=weight_gradient)
            for t in temperatures
        }

    return {
        "title": title,
        "effective_dimension": effective_dimension(population),
        "mean_length": float(np.linalg.norm(population.mean(axis=0, dtype=np.float64))),
        "differentiated": at_all_temperatures(True),
        "published": at_all_temperatures(False),
    }


def _parse_numbers(
    name: str, texts: Sequence[str], kind: Callable[[str], _Number], least: _Number
) -> list[_Number]:
    """Returns the sorted numbers of a flag.

    Raises:
      ValueError: there are none, one is no number or below `least`, or one is repeated.
    """
    try:
        numbers = [kind(text) for text in texts]
    except ValueError:
        numbers = []
    in_range = all(number >= least for number in numbers)
    if not numbers or not in_range or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"--{name}={','.join(texts)}: expected numbers of {least} or more, separated by "
            "commas, each of them once"
        )
    return sorted(numbers)


def _parse_temperatures(options: flags.FlagValues) -> list[float]:
    temperatures = _parse_numbers("temperatures", options.temperatures, float, 0)
    highest = max(temperatures)
    if highest * options.alpha > 30:
        raise ValueError(
            f"--temperatures={highest:g} times --alpha={options.alpha:g} is above 30, where the "
            "smallest weights are lost in rounding: lower one of them"
        )
    return temperatures


def _check_out(options: flags.FlagValues) -> pathlib.Path:
    out = pathlib.Path(options.out)
    if not out.is_dir():
        raise ValueError(f"--out={out}: found no such folder, create it first")
    if not options.overwrite:
        for name in page.NAMES:
            command.check_free("out", out / name)
    return out


def _about(options: flags.FlagValues) -> dict[str, Any]:
    """Returns what was run, when, where and with which options."""
    names = ("batches", "classes", "images_per_class", "alpha", "embedding_dim", "spread", "seed")
    return {
        **record.circumstances("experiments.studies.gradient_question"),
        **{name: options[name].value for name in names},
    }


def main(_: Sequence[str]) -> None:
    """Measures, and writes the table, its numbers and the plot."""
    options = flags.FLAGS
    with command.user_errors():
        ranks = _parse_numbers("ranks", options.ranks, int, 2)
        temperatures = _parse_temperatures(options)
        out = _check_out(options)
        labels = np.repeat(np.arange(options.classes), options.images_per_class)
        # All runs are embedded first, so that an error in a run is reported at once.
        embedded = [embed_run(workdir, options) for workdir in options.workdir]
        runs = [
            measure(title, population, batches, labels, temperatures, options.alpha)
            for title, population, batches in embedded
        ]
        simulations = []
        for rank in ranks:
            batches = simulated(rank, labels, options)
            population = batches.reshape(-1, batches.shape[-1])
            title = f"simulated, rank {rank}"
            simulations.append(
                measure(title, population, batches, labels, temperatures, options.alpha)
            )
        about = _about(options)
        text = page.as_markdown([*simulations, *runs], temperatures, page.heading(about))
        numbers = {**about, "simulations": simulations, "runs": runs}
        plot = functools.partial(page.plot, simulations, runs, temperatures)
        record.write(out, "gradient_question", text, numbers, plot)
        print(text + f"written: {', '.join(str(out / name) for name in page.NAMES)}")


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the command."""
    define = functools.partial(flags.DEFINE_integer, flag_values=flag_values)
    define_list = functools.partial(flags.DEFINE_list, flag_values=flag_values)
    define_float = functools.partial(flags.DEFINE_float, flag_values=flag_values)
    flags.DEFINE_string(
        "out",
        None,
        "The existing folder for the table, its numbers and the plot.",
        required=True,
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace the files of an earlier run.", flag_values=flag_values
    )
    define_list("workdir", [], "The folders of runs whose test embeddings are measured too.")
    define_list(
        "ranks",
        ["4", "8", "16", "32", "64", "128"],
        "The numbers of directions in which the simulated embeddings vary.",
    )
    define_list(
        "temperatures",
        ["1", "5", "10", "20"],
        "The values of T_n, the temperature of the negatives' weights.",
    )
    define("batches", 20, "The number of batches of each kind of embeddings.", lower_bound=1)
    define("classes", 60, "The number of classes in a batch.", lower_bound=2)
    define("images_per_class", 3, "The number of examples of each class in a batch.", lower_bound=1)
    define("embedding_dim", 512, "The dimension of the simulated embeddings.", lower_bound=2)
    define_float(
        "spread",
        0.5,
        "The standard deviation of a class's examples, relative to that of the centres.",
        lower_bound=0.0,
    )
    define_float(
        "alpha", 1.2, "The negatives' boundary, a distance.", lower_bound=1e-6, upper_bound=2.0
    )
    define("seed", 0, "The seed of the simulation and of the drawn batches.", lower_bound=0)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command.parse_flags)
