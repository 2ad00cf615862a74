"""One experiment from its options to its report: the loop, top to bottom, for every data set."""
import contextlib
import functools
import json
import pathlib
import sys
import time
from typing import Callable

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorboardX
import tqdm

from experiments import config as config_lib
from experiments import report
from rll_jax import checkpoint, datasets, evaluate, images, loss, metrics, models, parallel, pipeline, sampler, train

_KS = (1, 2, 4, 8)


class BadRun(ValueError):
    """A run that cannot go on, told in one line."""


def main(open_split: Callable, augment: Callable, test_view: Callable, ks=_KS) -> None:
    """Runs the flags' experiment and exits with 2 and one line where they, the data or the workdir are at fault.

    Args:
      open_split: (data_dir, "train" or "test") -> datasets.ImageSet.
      augment: image_size -> (image, rng) -> (image_size, image_size, 3) uint8, for training.
      test_view: image_size -> image -> (image_size, image_size, 3) uint8.
      ks: the K of Recall@K.
    """
    logging.set_verbosity(logging.WARNING)  # some libraries raise it to INFO
    try:
        prepared = _prepare(config_lib.from_flags(), open_split, augment, test_view)
    except (ValueError, OSError) as error:
        sys.exit(_fail(error))
    try:
        _run(*prepared, ks)
    except (BadRun, images.BadImageError, OSError) as error:
        sys.exit(_fail(error))


def _fail(error) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _prepare(config, open_split, augment, test_view):
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
    splits = {split: open_split(config.data_dir, split) for split in ("train", "test")}
    datasets.check_disjoint(splits["train"], splits["test"])
    batches = sampler.ClassSampler(
        splits["train"].labels, config.classes_per_batch, config.images_per_class, config.seed
    )
    return config, workdir, runner, splits, batches, augment(config.image_size), test_view(config.image_size)


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


def _schedule(config) -> optax.Schedule:
    if config.schedule == "step":
        at = {int(step): config.decay_factor for step in config.decay_at.split(",") if step}
        return optax.piecewise_constant_schedule(config.learning_rate, at)
    warmup = round(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(config.steps, warmup + 1))


def _optimizer(config) -> optax.GradientTransformation:
    if config.optimizer == "adamw":
        matrices = functools.partial(jax.tree.map, lambda p: p.ndim > 1)  # neither batch norm nor bias decays
        return optax.adamw(_schedule(config), weight_decay=config.weight_decay, mask=matrices)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(_schedule(config), momentum=0.9))


def _run(config, workdir, runner, splits, batches, augment, view, ks) -> None:
    # ---- The model, its state and its steps
    model = models.EmbeddingNet(
        models.RESNETS[config.backbone],
        config.embedding_dim,
        config.level_names,
        dtype=jnp.dtype(config.dtype),
        batch_norm=config.batch_norm,
        axis_name=parallel.AXIS,
    )
    state = runner.replicate(train.create_train_state(model, _optimizer(config), config.image_size, config.seed))
    ranked_list_loss = functools.partial(
        loss.ranked_list_loss,
        alpha=config.alpha,
        margin=config.margin,
        temperature_pos=config.temperature_pos,
        temperature_neg=config.temperature_neg,
        balance=config.balance,
    )
    train_step = runner.train(functools.partial(train.train_step, loss=ranked_list_loss))
    embed = runner.embed(train.embed_step)

    # ---- The workdir: what is there goes on from its last checkpoint
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "flags.txt").write_text(config.as_flagfile())
    with contextlib.ExitStack() as stack:
        saved = checkpoint.Checkpoints(workdir / "checkpoints", keep=config.keep)
        stack.callback(saved.close)
        start = saved.latest_step() or 0
        if start:
            state = saved.restore(start, state)
            print(f"resuming {workdir} at step {start} of {config.steps}", flush=True)
        log = stack.enter_context(_Log(workdir, start))

        def evaluate_at(step):
            embeddings = evaluate.embed_images(
                state, splits["test"], view, embed, runner, batch_size=config.eval_batch_size, threads=config.threads
            )
            if not np.isfinite(embeddings).all():
                raise BadRun(f"the embeddings are not finite at step {step}: lower --learning_rate")
            scores = metrics.retrieval_metrics(embeddings, splits["test"].labels, ks=ks)
            log.write(step, scores)
            line = "  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items() if "queries" not in name)
            progress.write(f"step {step}: {line}")
            return embeddings

        # ---- The loop
        began = time.time()
        with tqdm.tqdm(
            total=config.steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 10
        ) as progress:
            embeddings = None
            if start == 0:
                embeddings = evaluate_at(0)
            source = pipeline.train_batches(
                splits["train"], batches, augment, start=start, stop=config.steps, threads=config.threads
            )
            for step, batch in enumerate(pipeline.prefetch(source, runner.place), start=start + 1):
                state, measured = train_step(state, batch)
                last = step == config.steps
                if step % config.log_every == 0 or last:
                    values = {name: float(value) for name, value in measured.items()}
                    if not all(map(np.isfinite, values.values())):
                        raise BadRun(f"not finite at step {step}: {values}; lower --learning_rate")
                    rate = (step - start) * batches.batch_size / (time.time() - began)
                    log.write(step, values | {"images_per_second": rate})
                    progress.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.0f} images/s", refresh=False)
                progress.update()
                if step % config.eval_every == 0 or last:
                    embeddings = evaluate_at(step)
                if step % config.checkpoint_every == 0 or last:
                    saved.save(step, state)
            if embeddings is None:  # the run had ended before: measured again for the report
                embeddings = evaluate_at(config.steps)

    report.write(
        workdir / "report.html",
        title=f"Retrieval on unseen classes: {workdir.name}",
        lines=[json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
        options=config.as_flagfile(),
        test=splits["test"],
        embeddings=embeddings,
    )
    print(f"Recall@K on {len(np.unique(splits['test'].labels))} classes never trained on: {_final(log.last_scores, ks)}")
    print(f"report: {workdir / 'report.html'}")


def _final(scores, ks) -> str:
    return "  ".join(f"Recall@{k} {100 * scores[f'recall@{k}']:.1f} %" for k in ks)


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
        self.last_scores = {}

    def write(self, step: int, values: dict) -> None:
        if "recall@1" in values:
            self.last_scores = values
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
