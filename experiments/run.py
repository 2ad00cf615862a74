"""One experiment from its options to its report: the loop, top to bottom, for every data set."""
import contextlib
import functools
import json
import pathlib
import sys
import time

import numpy as np
import tensorboardX
import tqdm

from experiments import config as config_lib
from experiments import report, sources, trained
from experiments.evaluate import score_table
from rll_jax import checkpoint, datasets, evaluate, images, loss, metrics, models, parallel, pipeline, sampler, train


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
    """Everything that can be refused, before anything is written."""
    workdir = pathlib.Path(config.workdir)
    _check_workdir(workdir, config)
    runner = parallel.make_runner(config.parallel)
    batch_size = config.classes_per_batch * config.images_per_class
    if batch_size % runner.num_devices:
        raise ValueError(
            f"a batch of {config.classes_per_batch} classes x {config.images_per_class} images = {batch_size} images "
            f"cannot be shared by {runner.num_devices} devices: change --classes_per_batch or --images_per_class"
        )
    source = sources.SOURCES[config.dataset]
    splits = {split: source.open_split(config.data_dir, split) for split in ("train", "test")}
    datasets.check_splits(splits["train"], splits["test"])
    batches = sampler.ClassSampler(
        splits["train"].labels, config.classes_per_batch, config.images_per_class, config.seed
    )
    state = trained.make_state(config, runner)
    if config.pretrained:
        state = trained.start_from(state, config)
    return config, workdir, runner, source, splits, batches, state


def _check_workdir(workdir: pathlib.Path, config) -> None:
    """Raises ValueError unless the workdir is free or holds this very run."""
    saved = workdir / "flags.txt"
    if not saved.exists():
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise ValueError(f"--workdir={workdir} is in use and holds no run to resume: choose another folder")
        return
    before = dict(line.lstrip("-").split("=", 1) for line in saved.read_text().splitlines() if "=" in line)
    now = dict(line.lstrip("-").split("=", 1) for line in config.as_flagfile().splitlines())
    differing = [
        f"--{name}={before.get(name, '(none)')} there, {value} here"
        for name, value in now.items()
        if before.get(name) != value and name not in config_lib.FREE_TO_CHANGE
    ]
    if differing:
        raise ValueError(f"--workdir={workdir} holds another run ({'; '.join(differing)}): choose another --workdir")


def _run(config, workdir, runner, source, splits, batches, state) -> None:
    # ---- The steps
    ranked_list_loss = functools.partial(
        loss.ranked_list_loss,
        alpha=config.alpha,
        margin=config.margin,
        temperature_pos=config.temperature_pos,
        temperature_neg=config.temperature_neg,
        balance=config.balance,
        gallery_gradient=config.gallery_gradient,
    )
    train_step = runner.train(functools.partial(train.train_step, loss=ranked_list_loss, ema_decay=config.ema))
    embed = functools.partial(
        evaluate.embed_images,
        data=splits["test"],
        view=source.test_view(config.image_size),
        embed=runner.embed(train.embed_step),
        runner=runner,
        batch_size=config.eval_batch_size,
        threads=config.threads,
    )

    # ---- The workdir: what is there goes on from its last checkpoint
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "flags.txt").write_text(config.as_flagfile())
    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(checkpoint.Checkpoints(workdir / "checkpoints", keep=config.keep))
        start = saved.latest_step() or 0
        if start:
            state = saved.restore(start, state)
            print(f"resuming {workdir} at step {start} of {config.steps}", flush=True)
        log = stack.enter_context(_Log(workdir, start))

        def evaluate_at(step):
            levels = embed(state)
            embeddings = np.asarray(models.concatenated(levels))
            try:
                scores = metrics.retrieval_metrics(embeddings, splits["test"].labels, ks=source.ks)
            except ValueError as error:  # not finite, or all zero
                raise BadRun(f"step {step}: {error}; lower --learning_rate")
            log.write(step, scores)
            line = "  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items() if "queries" not in name)
            progress.write(f"step {step}: {line}")
            return levels

        # ---- The loop
        with tqdm.tqdm(
            total=config.steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 10
        ) as progress:
            levels = None
            if start == 0:
                evaluate_at(0)
            loaded = pipeline.train_batches(
                splits["train"],
                batches,
                source.augment(config.image_size),
                images.ClassTransform() if config.class_augment else None,
                start=start,
                stop=config.steps,
                threads=config.threads,
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
                    levels = evaluate_at(step)
                    since = step, time.time()
                if step % config.checkpoint_every == 0 or last:
                    saved.save(step, state)
            if levels is None:  # the run had ended before: measured again for the report
                levels = evaluate_at(config.steps)

    # ---- What is left to the user
    print("writing the report ...", flush=True)
    table = score_table(levels, splits["test"].labels, source.ks, clustering=False)
    report.write(
        workdir / "report.html",
        title=f"Retrieval on unseen classes: {workdir.name}",
        lines=[json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
        config=config,
        test=splits["test"],
        embeddings=np.asarray(models.concatenated(levels)),
        table=table,
    )
    *_, final = table.values()
    recalls = "  ".join(f"Recall@{k} {100 * final[f'recall@{k}']:.1f} %" for k in source.ks)
    print(f"Recall@K on {len(np.unique(splits['test'].labels))} classes never trained on: {recalls}")
    print(f"report: {workdir / 'report.html'}")


class _Log:
    """metrics.jsonl and TensorBoard events; what an interrupted run wrote past its checkpoint is taken back."""

    def __init__(self, workdir: pathlib.Path, start: int):
        path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if start and json.loads(line)["step"] <= start]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(line + "\n" for line in kept))
        aside.replace(path)
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
