"""Looks at a dataset before anything trains on it: what is in it, and what is in it twice.

    python -m experiments.check_data --data_dir=DIR
    python -m experiments.check_data --dataset=cub --data_dir=DIR --groups_out=groups.csv

Reads each image once. Prints the classes, the sizes, the images that cannot be read, and the copies
between train and test, between classes, and within a class; and writes a page that shows them.
Copies are the same bytes, or near: by a perceptual hash that survives other sizes, qualities and
brightness; with --workdir by the embeddings of a trained network too.

--groups_out writes the groups of copies. `evaluate --groups=FILE` then leaves the copies of a query
out of its ranking. Groups chain: an image near two others makes the three a group.

The exit code is 3 where images of train and test are copies (same bytes, or near by hash),
otherwise 1 where images cannot be read, otherwise 0.
"""

from collections import Counter
from collections.abc import Sequence
import pathlib
import sys
from typing import Any

from absl import app
from absl import flags as absl_flags
import numpy as np

from experiments.engine import (
    command,
    copies_page,
    copy_groups,
    datasets,
    flags,
    image_facts,
    phases,
    trained_network,
)
from experiments.engine.copies_page import Kind
from experiments.engine.image_facts import Facts
from experiments.engine.trained_network import TrainedNetwork
from rll_jax.data import copies, image_dataset, listings
from rll_jax.data.image_dataset import EncodedImageDataset
from rll_jax.networks import embedding_net

_UNREADABLE, _LEAK = 1, 3  # exit codes
_NAMED = 10  # faults that are printed
_PAGES = pathlib.Path("runs")
_MOST_BITS = 100  # of 256: some of any two images are as near
_MOST_PAIRS = 1e8
_SAMPLE = 2048  # images


def check_flags(
    options: absl_flags.FlagValues,
) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """Returns the files of --out and --groups_out; raises ValueError where a flag is wrong."""
    if not 0 <= options.near <= _MOST_BITS:
        raise ValueError(f"--near={options.near}: expected 0 to {_MOST_BITS} bits")
    if not 0 < options.near_similarity <= 1:
        raise ValueError(
            f"--near_similarity={options.near_similarity}: expected a cosine above 0, at most 1"
        )
    groups_out = pathlib.Path(options.groups_out) if options.groups_out else None
    if groups_out is not None:
        command.check_free("groups_out", groups_out)
        if groups_out.suffix != ".csv":
            raise ValueError(f"--groups_out={groups_out}: expected a name that ends in .csv")
    if not options.out:
        return None, groups_out
    out = pathlib.Path(options.out)
    command.check_free("out", out)
    if out == groups_out:
        raise ValueError(f"--out and --groups_out are both {out}")
    return out, groups_out


def _free_page() -> pathlib.Path:
    names = ("check_data.html", *(f"check_data_{n}.html" for n in range(2, 1000)))
    return next(path for name in names if not (path := _PAGES / name).exists())


def _split_names(splits: datasets.Splits) -> np.ndarray:
    """Returns the (N,) split of each image, train first."""
    train = np.full(len(splits["train"]), listings.TRAIN, "<U7")
    return np.concatenate([train, datasets.roles(splits["test"])])


def _about_images(
    data: EncodedImageDataset, splits: np.ndarray, facts: Facts, faults: Sequence[str]
) -> list[str]:
    """Returns what the readable images are, in lines."""
    lines = []
    for split in dict.fromkeys(splits.tolist()):
        _, counts = np.unique(data.labels[splits == split], return_counts=True)
        alone = f"; {np.sum(counts == 1):,} classes have one image" if (counts == 1).any() else ""
        lines.append(
            f"{split}: {counts.sum():,} images of {len(counts):,} classes; images per class: "
            f"{counts.min()} to {counts.max()}, median {np.median(counts):g}{alone}"
        )
    order = np.argsort(facts.sizes.prod(axis=1), kind="stable")
    small, middle, large = (facts.sizes[order[i]] for i in (0, len(order) // 2, -1))
    kib = np.quantile(data.sizes, [0, 0.5, 1]) / 2**10
    lines.append(
        f"pixels: {small[0]} x {small[1]} to {large[0]} x {large[1]}, median "
        f"{middle[0]} x {middle[1]}; KiB: {kib[0]:.1f} to {kib[2]:,.1f}, median {kib[1]:,.1f}"
    )
    kinds = Counter(facts.kinds.tolist()).most_common()
    lines.append(f"formats: {', '.join(f'{kind} {count:,}' for kind, count in kinds)}")
    if flat := int(facts.is_flat.sum()):
        lines.append(f"of one colour: {flat:,}, such as {data.paths[facts.is_flat.argmax()]}")
    if faults:
        more = "; ..." if len(faults) > _NAMED else ""
        lines.append(f"cannot be read: {len(faults):,}: {'; '.join(faults[:_NAMED])}{more}")
    return lines


def near_by_embeddings(
    trained: TrainedNetwork, data: EncodedImageDataset, similarity: float, items: copies.Items
) -> copies.Copies | str:
    """Returns the copies by a network's embeddings, or why there is nothing to say of them."""
    bad: list[int] = []
    levels = trained.embed(data, on_bad=bad.append, progress="embedding the images")
    embeddings = np.array(embedding_net.concatenate_levels(levels), np.float32)
    embeddings[bad] = 0  # near nothing
    some = np.random.default_rng(0).permutation(len(data))[:_SAMPLE]
    share = np.mean(embeddings[some] @ embeddings[some].T >= similarity) - 1 / len(some)
    if share * len(data) ** 2 / 2 > _MOST_PAIRS:
        return f"left out: {100 * share:.0f} % of all pairs are so near: raise --near_similarity"
    return copies.find(embeddings, similarity, items)[1]


def _kinds(
    trained: TrainedNetwork | None, data: EncodedImageDataset, is_test: np.ndarray, facts: Facts
) -> tuple[list[Kind], list[str]]:
    """Returns the kinds of copies, and lines about what was left out."""
    options, notes = absl_flags.FLAGS, []
    items = copies.Items(data.labels, is_test, facts.contents)
    similarity = copies.similarity_at(options.near)
    exact, near = copies.find(facts.hashes, similarity, items, colours=facts.colours)
    kinds = [
        Kind("same bytes", exact, lambda _: ""),
        Kind("near by hash", near, lambda s: f"{copies.bits_at(s)} of 256 bits differ"),
    ]
    if trained is not None:
        found = near_by_embeddings(trained, data, options.near_similarity, items)
        if isinstance(found, str):
            notes.append(f"near by embeddings: {found}")
        else:
            kinds.append(Kind("near by embeddings", found, lambda s: f"cosine {s:.3f}"))
    return kinds, notes


def _about_copies(kinds: Sequence[Kind], is_test: np.ndarray, groups: np.ndarray) -> list[str]:
    """Returns how many images have copies, in lines."""
    heads = ["images with a copy", "train and test", "between classes", "within a class"]
    lines = ["  ".join(heads)]
    for kind in kinds:
        counts = (kind.found.partners >= 0).sum(axis=1)
        cells = [f"{n:,}".rjust(len(head)) for n, head in zip(counts, heads[1:], strict=True)]
        lines.append("  ".join([kind.name.ljust(len(heads[0])), *cells]))
    _, sizes = np.unique(groups, return_counts=True)
    many = sizes[sizes > 1]
    if len(many):
        lines.append(
            f"groups of copies: {len(many):,} with {many.sum():,} images, the largest with "
            f"{many.max():,}"
        )
    leaks = _leaks(kinds, is_test)
    lines.append(f"test images with a copy in train: {leaks:,} of {is_test.sum():,}")
    return lines


def _leaks(kinds: Sequence[Kind], is_test: np.ndarray) -> int:
    """Returns how many test images have a copy in train, by bytes or by hash."""
    has = [kind.found.partners[copies.SPLITS] >= 0 for kind in kinds[:2]]
    return int((np.logical_or(*has) & is_test).sum())


def main(_: Any) -> None:
    """Runs the command."""
    options = absl_flags.FLAGS
    with command.user_errors():
        out, groups_out = check_flags(options)
        config = flags.config_from_flags()
        trained = None
        if options.workdir:
            with phases.told("reading the network"):
                trained = trained_network.load(options.workdir)
        splits = datasets.open_in_place(config.data, config.runtime)
        (out.parent if out else _PAGES).mkdir(exist_ok=True)
        names, whole = _split_names(splits), image_dataset.all_as_test(splits)["test"]
        if groups_out is not None:
            copy_groups.check_names(whole)
        rows, facts, faults = image_facts.read(whole, config.runtime.threads)
        data, is_test = whole.take(rows), names[rows] != listings.TRAIN
        kinds, notes = _kinds(trained, data, is_test, facts)
        groups = copies.join_groups(*(kind.found.groups for kind in kinds))
        lines = _about_images(data, names[rows], facts, faults)
        lines += [*_about_copies(kinds, is_test, groups), *notes]
        print("\n".join(lines), flush=True)
        title = f"The images of {config.runtime.data_dir or config.data.dataset}"
        with phases.told("drawing the page"):
            out = out or _free_page()
            copies_page.write(out, title, lines, data, names[rows], kinds, faults)
        print(f"page: {out}")
        if groups_out is not None:
            of_all = np.arange(len(whole))
            of_all[rows] = rows[groups]
            copy_groups.write(groups_out, whole, names, of_all)
            print(f"groups: {groups_out}")
    if _leaks(kinds, is_test):
        sys.exit(_LEAK)
    sys.exit(_UNREADABLE if faults else 0)


if __name__ == "__main__":
    flags.define(
        dataset="folder",
        only=(
            "dataset",
            "data_dir",
            "index",
            "test_share",
            "test_classes",
            "split_seed",
            "image_key",
            "label_key",
            "threads",
        ),
    )
    absl_flags.DEFINE_integer(
        "near",
        40,
        "In how many of 256 bits the hashes of near copies differ at most. Other sizes, qualities "
        "and brightness change up to 26 bits, a border cut by 2 % about 28; photographs of other "
        "things differ in more than 60, simple drawings in less: take 8 for them.",
    )
    absl_flags.DEFINE_string(
        "workdir", "", "The folder of a run, whose network finds near copies too. Empty: none."
    )
    absl_flags.DEFINE_float(
        "near_similarity", 0.95, "The least cosine of near copies by the embeddings of --workdir."
    )
    absl_flags.DEFINE_string(
        "groups_out", "", "The .csv to write the groups of copies to, for evaluate. Empty: none."
    )
    absl_flags.DEFINE_string(
        "out", "", "The page to write. Empty: check_data.html in runs/, or the next free name."
    )
    app.run(main, flags_parser=command.parse_flags)
