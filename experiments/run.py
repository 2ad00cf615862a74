"""One experiment from its options to its report: the loop, top to bottom, for every data set."""
import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time

from jax.experimental.compilation_cache import compilation_cache
import jax
import numpy as np
import tensorboardX
import tqdm

from experiments import config as config_lib
from experiments import report, sources, trained
from experiments.evaluate import score_table
from rll_jax import cache, checkpoint, datasets, evaluate, images, loss, metrics, models, parallel, pipeline, sampler, train
from rll_jax import views as views_lib
from rll_jax.published import is_remote


class BadRun(ValueError):
    """A run that cannot go on, told in one line."""


def main(_) -> None:
    """Runs the flags' experiment and exits with 2 and one line where they, the data or the workdir are at fault."""
    with config_lib.mistakes_in_one_line():
        prepared = _prepare(config_lib.from_flags())
    try:
        _run(*prepared)
    except (BadRun, images.BadImageError, OSError) as error:
        sys.exit(config_lib.fail(error))


def _prepare(config):
    """Everything that can be refused, before anything is written but a benchmark's prepared files."""
    workdir = pathlib.Path(config.workdir)
    _check_workdir(workdir, config)
    runner = parallel.make_runner(config.parallel)
    batch_size = config.classes_per_batch * config.images_per_class
    if batch_size % runner.num_devices:
        raise ValueError(
            f"a batch of {config.classes_per_batch} classes x {config.images_per_class} images = {batch_size} images "
            f"cannot be shared by {runner.num_devices} devices: change --classes_per_batch or --images_per_class"
        )
    published = trained.read_pretrained(config) if config.pretrained else None
    splits, left_out = {}, []
    for split, data in sources.open_sets(config).items():
        bad = datasets.find_bad(data, full=config.verify_images == "full", threads=config.threads)
        sources.refuse_bad(bad, split, data, config)
        splits[split] = _cached(datasets.without(data, bad) if bad else data, split, config)
        left_out += bad.values()
    datasets.check_splits(splits["train"], splits["test"])
    return config, workdir, runner, splits, _sampler(splits["train"], config), published, left_out


def _check_workdir(workdir: pathlib.Path, config) -> None:
    """Raises ValueError unless the workdir is local, and free or holds this very run."""
    if is_remote(config.workdir):
        raise ValueError(f"--workdir={config.workdir}: expected a local folder")
    saved = workdir / "flags.txt"
    if not saved.exists():
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise ValueError(f"--workdir={workdir} is in use and holds no run to resume: choose another folder")
        return
    before = config_lib.from_flagfile(saved)
    differing = [
        f"--{field.name}={getattr(before, field.name)} there, {getattr(config, field.name)} here"
        for field in dataclasses.fields(config)
        if getattr(before, field.name) != getattr(config, field.name) and field.name not in config_lib.FREE_TO_CHANGE
    ]
    if differing:
        raise ValueError(f"--workdir={workdir} holds another run ({'; '.join(differing)}): choose another --workdir")


def _sampler(data, config):
    classes, each, seed = config.classes_per_batch, config.images_per_class, config.seed
    if config.sampling == "shuffle":
        return sampler.ShuffleSampler(data.labels, classes * each, config.min_positives, seed)
    if config.sampling == "hierarchical":
        if data.super_labels is None:
            raise ValueError(f"--sampling=hierarchical: {config.dataset} has no super classes")
        return sampler.HierarchicalSampler(data.labels, data.super_labels, classes, each, config.super_classes_per_batch, seed)
    return sampler.ClassSampler(data.labels, classes, each, seed)


def _cached(data, split: str, config):
    if config.cache == "none":
        return data
    if config.cache == "memory" and config.worker_processes:
        raise ValueError("--cache=memory is of one process: use --cache=disk with --worker_processes")
    if config.cache == "disk" and is_remote(config.data_dir):
        raise ValueError(f"--cache=disk writes into --data_dir, and {config.data_dir} is not a local folder: use --cache=memory, or a local copy")
    short_side = sources.cached_side(config.image_size)
    size = cache.estimated_bytes(data, short_side) / 2**30
    print(f"cache: about {size:.1f} GiB {'in memory' if config.cache == 'memory' else 'on disk'} for {len(data)} {split} images", flush=True)
    if config.cache == "memory":
        return cache.in_memory(data, short_side)
    if not config.data_dir:
        raise ValueError("--cache=disk needs --data_dir, where it is written")
    return cache.on_disk(data, short_side, config.data_dir, split)


def _run(config, workdir, runner, splits, batches, published, left_out) -> None:
    # ---- The steps
    ranked_list_loss = functools.partial(
        loss.ranked_list_loss,
        alpha=config.alpha,
        margin=config.margin,
        temperature_pos=config.temperature_pos,
        temperature_neg=config.temperature_neg,
        balance=config.balance,
        pair_term=config.pair_term,
        query_weighting=config.query_weighting,
        weight_gradient=config.weight_gradient,
        gallery_gradient=config.gallery_gradient,
    )
    train_step = runner.train(functools.partial(train.train_step, loss=ranked_list_loss, ema_decay=config.ema))
    views, ks = sources.views(config), sources.find(config.dataset).ks
    embed = functools.partial(
        evaluate.embed_images,
        data=splits["test"],
        view=views.test(config.image_size),
        embed=runner.embed(train.embed_step),
        runner=runner,
        batch_size=config.eval_batch_size,
        threads=config.threads,
        processes=config.worker_processes,
    )

    # ---- The workdir: what is there goes on from its last checkpoint
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "flags.txt").write_text(config.as_flagfile())
    bad_images = _BadImages(workdir / "bad_images.txt", config.max_bad_images, left_out)
    if config.compilation_cache and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
        compilation_cache.reset_cache()  # the first compilation of a process decides whether there is one
    state = trained.make_state(config, runner, published)
    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(checkpoint.Checkpoints(workdir / "checkpoints", keep=config.keep))
        start = saved.latest_step() or 0
        if start:
            state = saved.restore(start, state)
            print(f"resuming {workdir} at step {start} of {config.steps}", flush=True)
        log = stack.enter_context(_Log(workdir, start))

        def evaluate_at(step):
            """The test images that could be read, and their embeddings."""
            bad = set()
            levels = embed(state, on_bad=lambda row: bad.add(row) or bad_images.found(splits["test"], row))
            rows = np.setdiff1d(np.arange(len(splits["test"])), list(bad))
            data, levels = splits["test"].take(rows), {level: e[rows] for level, e in levels.items()}
            embeddings = np.asarray(models.concatenated(levels))
            try:
                scores = metrics.retrieval_metrics(*evaluate.by_role(embeddings, data), ks=ks)
            except ValueError as error:  # not finite, or all zero
                raise BadRun(f"step {step}: {error}; lower --learning_rate")
            log.write(step, scores)
            line = "  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items() if "queries" not in name)
            progress.write(f"step {step}: {line}")
            return data, levels

        # ---- The loop
        with tqdm.tqdm(
            total=config.steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 10
        ) as progress:
            evaluated = None
            if start == 0:
                evaluate_at(0)
            loaded = pipeline.train_batches(
                splits["train"],
                batches,
                views.train(config.image_size),
                views_lib.ClassTransform() if config.class_augment else None,
                start=start,
                stop=config.steps,
                spread=not config.class_on_one_device,
                threads=config.threads,
                processes=config.worker_processes,
                on_bad=functools.partial(bad_images.found, splits["train"]),
            )
            since = start, time.time()
            for step, batch in enumerate(pipeline.prefetch(loaded, runner.place), start=start + 1):
                state, measured = train_step(state, batch)
                last = step == config.steps
                if step % config.log_every == 0 or last:
                    values = {name: float(value) for name, value in measured.items()}
                    if not all(map(np.isfinite, values.values())):
                        raise BadRun(f"not finite at step {step}: {values}; lower --learning_rate")
                    rate = (step - since[0]) * batches.batch_size / (time.time() - since[1])
                    since = step, time.time()
                    log.write(step, values | {"images_per_second": rate})
                    progress.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.0f} images/s", refresh=False)
                progress.update()
                if step % config.eval_every == 0 or last:
                    evaluated = evaluate_at(step)
                    since = step, time.time()
                if step % config.checkpoint_every == 0 or last:
                    saved.save(step, state)
            if evaluated is None:  # the run had ended before: measured again for the report
                evaluated = evaluate_at(config.steps)

    # ---- What is left to the user
    print("writing the report ...", flush=True)
    test, levels = evaluated
    table = score_table(levels, test, ks, clustering=False)
    report.write(
        workdir / "report.html",
        title=f"Retrieval on unseen classes: {workdir.name}",
        lines=[json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
        config=config,
        test=test,
        embeddings=np.asarray(models.concatenated(levels)),
        table=table,
    )
    *_, final = table.values()
    recalls = "  ".join(f"Recall@{k} {100 * final[f'recall@{k}']:.1f} %" for k in ks)
    print(f"Recall@K on {len(np.unique(test.labels))} classes never trained on: {recalls}")
    print(f"report: {workdir / 'report.html'}")


class _BadImages:
    """bad_images.txt: the pictures that were left out, and those that turned out broken on the way, up to a limit."""

    def __init__(self, path: pathlib.Path, limit: int, left_out: list[str]):
        self._path, self._limit, self._known = path, limit, set(_lines(path))
        self._broken = set()
        for text in left_out:
            self._list(f"left out: {text}")

    def found(self, data, row: int) -> None:
        """Raises BadRun where there are too many."""
        if str(data.paths[row]) in self._broken:
            return
        self._broken.add(str(data.paths[row]))
        try:
            data.image(row)
            reason = f"{data.paths[row]}: could not be read for a while"
        except images.BadImageError as error:
            reason = " ".join(str(error).split())
        self._list(f"broken: {reason}")
        tqdm.tqdm.write(f"left out: {reason}", file=sys.stderr)
        if len(self._broken) > self._limit:
            raise BadRun(
                f"{len(self._broken)} pictures could not be read, more than --max_bad_images={self._limit}: see {self._path}; the last is {reason}"
            )

    def _list(self, line: str) -> None:
        if line not in self._known:
            self._known.add(line)
            with self._path.open("a") as file:
                file.write(line + "\n")


class _Log:
    """metrics.jsonl and TensorBoard events; what an interrupted run wrote past its checkpoint is taken back."""

    def __init__(self, workdir: pathlib.Path, start: int):
        path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if start and json.loads(line)["step"] <= start]
        with config_lib.written_whole(path) as aside:
            aside.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._seen = {(entry["step"], "recall@1" in entry) for entry in map(json.loads, kept)}

    def write(self, step: int, values: dict) -> None:
        if (step, "recall@1" in values) in self._seen:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name.replace("@", "_at_"), value, step)  # TensorBoard's names have no @

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        self._board.close()


def _lines(path: pathlib.Path) -> list[str]:
    """The whole lines of a file; the last may have been cut off by a kill."""
    return path.read_text().split("\n")[:-1] if path.exists() else []
