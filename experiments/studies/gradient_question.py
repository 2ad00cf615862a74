"""Which way the gradient moves a pair: how many of the active negatives does one with differentiated weights pull nearer?

    python -m experiments.studies.gradient_question --out=experiments/results                           # the simulation: half a minute
    python -m experiments.studies.gradient_question --out=DIR --workdir=runs/emoji                      # and where a trained network lies

The slope of a pair is dL_i / dd_ij; a descent step on a slope above 0 brings the pair nearer, which is wrong for a negative. Published: the
weights are constants, so the slope of an active negative is minus its share of the weight. Differentiated, as in pytorch-metric-learning
2.9: -p_ij (1 + T (h_ij - L_i)), above 0 for every negative whose hinge h is more than 1 / T below the weighted mean L_i. The slopes here
are not taken from that formula but from gradients of `rll_jax.loss`. Writes gradient_question.md, .json and .png.
"""

import functools
import json
import pathlib
import shlex
import sys
import time

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments.engine import build, checks, datasets, logs, measuring, scoring
from experiments.engine import config as config_lib
from rll_jax import loss

_NAMES = ("gradient_question.md", "gradient_question.json", "gradient_question.png")


# ---- What is measured
@functools.partial(jax.jit, static_argnames="weight_gradient")
def slopes(embeddings, labels, alpha, temperature, *, weight_gradient):
    """dL_i / dd_ij of each query's list and the active negatives, both (N, N), of embeddings of unit length.

    The loss sees distances alone. So each query is put at 0 and its gallery on the axes, at the same distances: its gradient, the one with
    which it is trained, has then minus the slope of a pair in that pair's coordinate.
    """
    d2 = 2 - 2 * jnp.matmul(embeddings, embeddings.T, precision=jax.lax.Precision.HIGHEST)
    d = jnp.sqrt(jnp.maximum(d2, 0)) * ~jnp.eye(
        len(labels), dtype=bool
    )  # itself: a positive at 0, which is trivial
    options = {
        "alpha": alpha,
        "temperature_neg": temperature,
        "weight_gradient": weight_gradient,
        "normalize": False,
    }

    def of_query(row):
        gallery, label = jnp.diag(row[0]), row[1][None]
        of = lambda query: loss.ranked_list_loss(
            query, label, gallery=gallery, gallery_labels=labels, **options
        )
        return -jax.grad(of)(jnp.zeros((1, len(labels)), d.dtype))[0]

    return jax.lax.map(of_query, (d, labels)), (labels[:, None] != labels[None, :]) & (d < alpha)


def shares(batches, labels, alpha, temperature, *, weight_gradient) -> dict:
    """In percent, the means over batches (B, N, D) and the standard deviation of the first.

    pairs: of the active negatives of all lists, those pulled nearer. norm: their part of the sum of |slope| over the active negatives.
    both_lists: as pairs, where both ends move, so that the slopes of (i, j) and (j, i) add. active: of all negatives.
    """
    rows = []
    for batch in batches:
        with jax.enable_x64(
            True
        ):  # a gradient's coordinates are rounded by the largest: float32 has no sign for weights below 1e-8
            found = slopes(
                np.asarray(batch, np.float64),
                labels,
                alpha,
                temperature,
                weight_gradient=weight_gradient,
            )
        slope, active = map(np.asarray, found)
        wrong, size, count = active & (slope > 0), np.abs(slope[active]).sum(), active.sum()
        row = (
            wrong.sum() / max(count, 1),
            slope[wrong].sum() / (size or 1),
            (active & (slope + slope.T > 0)).sum() / max(count, 1),
        )
        rows.append([*row, count / (labels[:, None] != labels).sum()])
    means = dict(
        zip(("pairs", "norm", "both_lists", "active"), 100 * np.mean(rows, axis=0), strict=True)
    )
    return means | {"std": 100 * np.std(rows, axis=0)[0]}


def effective_dimension(embeddings) -> float:
    """The participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of (N, D): D where all are alike."""
    covariance = np.cov(np.asarray(embeddings, np.float64), rowvar=False)
    return float(np.trace(covariance) ** 2 / np.sum(covariance**2))


def simulated(rank, labels, options) -> np.ndarray:
    """(B, N, D) float32 of unit length: normal class centres and, narrower, examples in `rank` random directions of D."""
    rng = np.random.default_rng((options.seed, rank))
    directions = rng.standard_normal((rank, options.embedding_dim))
    centres = rng.standard_normal((options.batches, options.classes, rank))[:, labels]
    points = (
        centres + options.spread * rng.standard_normal((options.batches, len(labels), rank))
    ) @ directions
    return (points / np.linalg.norm(points, axis=-1, keepdims=True)).astype(np.float32)


def drawn(workdir, options) -> tuple[str, np.ndarray, np.ndarray]:
    """Of a run: its title, all test embeddings of its last level (M, D), and batches of them (B, N, D)."""
    trained = build.load(workdir)
    sets, _ = datasets.open_usable(trained.config)
    checks.check_same_data(pathlib.Path(workdir), sets)
    data, levels = scoring.embed_readable(
        trained.embed,
        sets["test"],
        lambda data, row: print(f"left out: {data.paths[row]}", file=sys.stderr),
    )
    level = trained.config.level_names[-1]
    embeddings = levels[level] / np.maximum(
        np.linalg.norm(levels[level], axis=1, keepdims=True), 1e-12
    )
    classes = [
        rows
        for label in np.unique(data.labels)
        if len(rows := np.flatnonzero(data.labels == label)) >= options.images_per_class
    ]
    if len(classes) < options.classes:
        raise ValueError(
            f"--classes={options.classes}: {workdir} has {len(classes)} test classes of {options.images_per_class} images or more"
        )
    rng, batches = np.random.default_rng(options.seed), []
    for _ in range(options.batches):
        chosen = rng.choice(len(classes), options.classes, replace=False)
        batches.append(
            np.concatenate(
                [rng.choice(classes[c], options.images_per_class, replace=False) for c in chosen]
            )
        )
    title = f"{trained.config.dataset}, {' '.join(pathlib.Path(workdir).parts[-2:])}, level {level}, step {trained.step}"
    return title, embeddings, embeddings[np.array(batches)]


def row_of(title, population, batches, labels, temperatures, alpha) -> dict:
    of = lambda t, differentiated: shares(batches, labels, alpha, t, weight_gradient=differentiated)
    kinds = {"differentiated": True, "published": False}
    found = {kind: {f"{t:g}": of(t, value) for t in temperatures} for kind, value in kinds.items()}
    mean_length = float(np.linalg.norm(population.mean(axis=0, dtype=np.float64)))
    return {
        "title": title,
        "effective_dimension": effective_dimension(population),
        "mean_length": mean_length,
        **found,
    }


# ---- The table and the plot
def as_markdown(rows, temperatures, about: str) -> str:
    names = [f"{t:g}" for t in temperatures]
    usual = min(names, key=lambda name: abs(float(name) - 10))  # the paper's
    head = [
        "embeddings",
        "effective dimension",
        "length of the mean",
        "active",
        *(f"T = {t}" for t in names),
        f"both lists, T = {usual}",
        "published, all T",
    ]
    lines = [
        "# Which way the gradient moves negative pairs\n",
        about,
        "Percent of the active negatives (in a query's list: nearer than alpha) that a descent step with differentiated weights pulls nearer, "
        "and in brackets their part of the negatives' gradient, the sum of |dL_i / dd_ij|. Both lists: where both ends move, the slopes of "
        "(i, j) and (j, i) add. Published: the same with constant weights, the largest at any T. Active: of all negatives. Effective "
        "dimension: participation ratio of the covariance's eigenvalues, of all batches together, or of all test embeddings of a run. A run need "
        "not lie on the simulated line: its embeddings may lie to one side of 0 (length of the mean), where more negatives are active.\n",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        moved = row["differentiated"]
        cells = [
            row["title"],
            f"{row['effective_dimension']:.1f}",
            f"{row['mean_length']:.2f}",
            f"{moved[usual]['active']:.0f}",
        ]
        cells += [f"{moved[t]['pairs']:.1f} ({moved[t]['norm']:.1f})" for t in names]
        cells += [
            f"{moved[usual]['both_lists']:.1f}",
            f"{max(found['pairs'] for found in row['published'].values()):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(simulations, runs, temperatures, path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots()
    at = [row["effective_dimension"] for row in simulations]
    for number, t in enumerate(f"{t:g}" for t in temperatures):
        found = [row["differentiated"][t] for row in simulations]
        axes.errorbar(
            at,
            [f["pairs"] for f in found],
            [f["std"] for f in found],
            fmt="o-",
            capsize=3,
            color=f"C{number}",
            label=f"T = {t}",
        )
        for row, mark in zip(runs, "*PXD" * len(runs)):
            axes.plot(
                row["effective_dimension"],
                row["differentiated"][t]["pairs"],
                mark,
                ms=12,
                mec="black",
                color=f"C{number}",
                zorder=3,
            )
    published = [max(found["pairs"] for found in row["published"].values()) for row in simulations]
    axes.plot(at, published, "--", color="black", zorder=4, label="published gradient, all T")
    for row, mark in zip(runs, "*PXD" * len(runs)):
        axes.plot(
            [],
            [],
            mark,
            ms=12,
            mec="black",
            mfc="none",
            linestyle="none",
            label=row["title"].replace(", level", ",\nlevel"),
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="effective dimension of the embeddings",
        ylabel="active negatives pulled nearer, percent",
        ylim=(-3, 103),
    )
    axes.grid(alpha=0.3)
    figure.legend(
        frameon=False,
        loc="outside right upper",
        title="weights differentiated, but for the dashed line",
    )
    figure.savefig(path, format="png", dpi=110)


def _numbers(name, texts, kind, least) -> list:
    try:
        numbers = [kind(text) for text in texts]
    except ValueError:
        numbers = []
    if not numbers or not min(numbers) >= least or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"--{name}={','.join(texts)}: expected numbers of {least} or more with commas between, each once"
        )
    return sorted(numbers)


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line():
        ranks, temperatures = (
            _numbers("ranks", options.ranks, int, 2),
            _numbers("temperatures", options.temperatures, float, 0),
        )
        if max(temperatures) * options.alpha > 30:
            raise ValueError(
                f"--temperatures={max(temperatures):g} times --alpha={options.alpha:g}: above 30 the least weights are lost in rounding"
            )
        out = pathlib.Path(options.out)
        if not out.is_dir():
            raise ValueError(f"--out={out}: no such folder")
        for name in () if options.overwrite else _NAMES:
            config_lib.check_free("out", out / name)
        labels = np.repeat(np.arange(options.classes), options.images_per_class)
        found = [
            drawn(workdir, options) for workdir in options.workdir
        ]  # first: what is wrong with a run is told at once
        runs = [
            row_of(title, everything, batches, labels, temperatures, options.alpha)
            for title, everything, batches in found
        ]
        simulations = []
        for rank in ranks:
            batches = simulated(rank, labels, options)
            population = batches.reshape(-1, batches.shape[-1])
            simulations.append(
                row_of(
                    f"simulated, rank {rank}",
                    population,
                    batches,
                    labels,
                    temperatures,
                    options.alpha,
                )
            )
        commit = json.loads(logs.environment())["commit"] or "unknown"
        command = shlex.join(
            ["python", "-m", "experiments.studies.gradient_question", *sys.argv[1:]]
        )
        about = {
            "command": command,
            "date": time.strftime("%F"),
            "hardware": measuring.machine().rpartition(",")[0],
            "commit": commit,
            "batches": options.batches,
            "classes": options.classes,
            "images_per_class": options.images_per_class,
            "alpha": options.alpha,
            "embedding_dim": options.embedding_dim,
            "spread": options.spread,
            "seed": options.seed,
        }
        what = f"{options.batches} batches of {options.classes} x {options.images_per_class}, alpha {options.alpha:g}. Simulated: normal class "
        what += f"centres in as many random directions of {options.embedding_dim} as the rank says, examples {options.spread:g} as wide about them."
        text = (
            f"    {command}\n\n{what}\n\n{about['date']}, {about['hardware']}, commit {commit}.\n"
        )
        text = as_markdown([*simulations, *runs], temperatures, text)
        with config_lib.written_whole(out / _NAMES[0]) as aside:
            aside.write_text(text)
        with config_lib.written_whole(out / _NAMES[1]) as aside:
            aside.write_text(
                json.dumps({**about, "simulations": simulations, "runs": runs}, indent=1) + "\n"
            )
        with config_lib.written_whole(out / _NAMES[2]) as aside:
            plot(simulations, runs, temperatures, aside)
        print(text + f"written: {', '.join(str(out / name) for name in _NAMES)}")


def define_flags(flag_values=flags.FLAGS) -> None:
    given = {"flag_values": flag_values}
    flags.DEFINE_string(
        "out", None, "folder for the table, its numbers and the plot", required=True, **given
    )
    flags.DEFINE_bool("overwrite", False, "replace those that are there", **given)
    flags.DEFINE_list(
        "workdir", [], "folders of runs whose test embeddings are measured too", **given
    )
    flags.DEFINE_list(
        "ranks",
        ["4", "8", "16", "32", "64", "128"],
        "directions in which the simulated embeddings vary",
        **given,
    )
    flags.DEFINE_list(
        "temperatures", ["1", "5", "10", "20"], "T_n of the negatives' weights", **given
    )
    flags.DEFINE_integer("batches", 20, "of each kind of embeddings", lower_bound=1, **given)
    flags.DEFINE_integer("classes", 60, "of a batch", lower_bound=2, **given)
    flags.DEFINE_integer("images_per_class", 3, "examples of each", lower_bound=1, **given)
    flags.DEFINE_integer("embedding_dim", 512, "of the simulation", lower_bound=2, **given)
    flags.DEFINE_float(
        "spread",
        0.5,
        "of a class's examples, of the simulation, by that of the centres",
        lower_bound=0.0,
        **given,
    )
    flags.DEFINE_float(
        "alpha", 1.2, "the negatives' boundary", lower_bound=1e-6, upper_bound=2.0, **given
    )
    flags.DEFINE_integer("seed", 0, "of the simulation and of the batches", lower_bound=0, **given)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=config_lib.parse_flags)
