"""One experiment from its options to its report: the loop, top to bottom, for every data set."""

import contextlib
import functools
import json
import sys
import time

import jax
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import tqdm

from experiments.engine import (
    build,
    checks,
    datasets,
    logs,
    losses,
    network_inputs,
    resume,
    scoring,
)
from experiments.engine import config as config_lib
from rll_jax import metrics
from rll_jax.data import images, pipeline
from rll_jax.data import views as views_lib
from rll_jax.networks import embedding_net
from rll_jax.training import checkpoint, embedding, steps


def main(_) -> None:
    """Runs the flags' experiment and exits with 2 and one line where they, the data or the workdir are at fault."""
    with config_lib.mistakes_in_one_line():
        config = config_lib.from_flags()
    with resume.last_word() if config.multihost else contextlib.nullcontext():
        _main(config)


def _main(config) -> None:
    if not config.multihost:  # the others would wait for this one
        resume.end_on_sigterm()
    with config_lib.mistakes_in_one_line():
        _join_processes(config)
        prepared = checks.prepare(config)
    try:
        _dry_run(prepared) if config.dry_run else _run(prepared)
    except (logs.BadRun, images.BadImageError, OSError) as error:
        sys.exit(config_lib.fail(error))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except jax.errors.JaxRuntimeError as error:
        gone = ("UNAVAILABLE", "DEADLINE", "ABORTED", "Gloo", "Connection", "coordination")
        if jax.process_count() == 1 or not any(word in str(error) for word in gone):
            raise
        print(
            f"error: another process of this run has gone: {str(error).splitlines()[0][:300]}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(resume.RUN_AGAIN)


def _join_processes(config) -> None:
    if not config.multihost:
        return
    try:
        jax.distributed.initialize(
            config.coordinator_address or None,
            config.num_processes or None,
            config.process_id if config.num_processes else None,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--multihost: cannot join the other processes: {str(error).splitlines()[0]}"
        )


def _train_step(config, train_labels):
    watch = functools.partial(steps.watch_distances, alpha=config.alpha, margin=config.margin)
    loss = losses.make(config, train_labels)
    return functools.partial(
        steps.train_step,
        loss=loss,
        ema_decay=config.ema,
        embed_chunk=config.embed_chunk,
        watch=watch,
    )


def _fresh_state(prepared):
    config, proxies = (
        prepared.config,
        losses.num_proxies(prepared.config, prepared.splits["train"].labels),
    )
    return build.make_state(config, prepared.runner, prepared.published, proxies)


def _batches(prepared, source, start: int, on_bad=None):
    """Those from step `start` on, this process's share of each."""
    config = prepared.config
    return pipeline.train_batches(
        source.data,
        prepared.batches,
        source.view,
        views_lib.ClassTransform() if config.class_augment else None,
        start=start,
        stop=config.steps,
        spread=not config.class_on_one_device,
        share=(jax.process_index(), jax.process_count()),
        threads=config.threads,
        processes=config.worker_processes,
        on_bad=on_bad,
    )


def _dry_run(prepared) -> None:
    """Everything but the steps, and what one of them takes."""
    config, _, runner, splits, *_ = prepared
    state, fed = network_inputs.of(prepared, _fresh_state(prepared))
    batch = next(_batches(prepared, fed["train"], 0))
    begun = time.time()
    compiled = (
        runner.train(_train_step(config, splits["train"].labels))
        .lower(state, runner.shard(batch))
        .compile()
    )
    seconds, memory = time.time() - begun, compiled.memory_analysis()
    flops = (compiled.cost_analysis() or {}).get("flops", 0)
    count = sum(p.size for p in jax.tree.leaves(state.params))
    print(f"data: {len(splits['train'])} train images, {len(splits['test'])} test images")
    print(f"network: {config.backbone}, levels {config.levels}: {count:,} parameters")
    for name, array in batch.items():
        print(
            f"batch, {name}: {array.shape} {array.dtype} in this process, of {jax.process_count()}"
        )
    print(
        f"step, compiled in {seconds:.1f} s for {runner.num_devices} devices: {flops / 1e9:.2f} GFLOP on each"
    )
    if memory is not None:
        parts = {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "results": memory.output_size_in_bytes,
        }
        print(
            "memory of each device: "
            + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in parts.items())
        )
    print("dry run: nothing was trained, and nothing written into the workdir")


def _run(prepared) -> None:
    config, workdir, runner, splits, batches, published, left_out = prepared
    first = jax.process_index() == 0
    say = functools.partial(print, flush=True) if first else lambda *_, **__: None
    train_step, ks = (
        runner.train(_train_step(config, splits["train"].labels)),
        datasets.find(config.dataset).ks,
    )
    rate_at = build.schedule(config)
    embed_step = runner.embed(steps.embed_step)
    embed = functools.partial(
        embedding.embed_images,
        runner=runner,
        batch_size=config.eval_batch_size,
        threads=config.threads,
        processes=config.worker_processes,
    )

    # ---- The workdir: what is there goes on from its last checkpoint
    if first:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = logs.locked(workdir)
        prints = json.dumps({split: checks.fingerprint(data) for split, data in splits.items()})
        environment = logs.environment()
        # the flags first: without them the folder would look like anything else after a kill
        for name, text in (
            ("flags.txt", config.as_flagfile()),
            ("data.json", prints),
            ("environment.json", environment),
        ):
            with config_lib.written_whole(workdir / name) as aside:
                aside.write_text(text)
    multihost_utils.sync_global_devices("workdir")
    bad_images = logs.BadImages(
        workdir / "bad_images.txt", config.max_bad_images, left_out if first else []
    )
    if config.compilation_cache and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
        compilation_cache.reset_cache()  # the first compilation of a process decides whether there is one
    state, start, best_score = resume.restore(workdir, config, runner, _fresh_state(prepared))
    if start:
        say(f"resuming {workdir} at step {start} of {config.steps}")
    try:
        state, fed = network_inputs.of(prepared, state)
    except ValueError as error:
        raise logs.BadRun(error)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock if first else contextlib.nullcontext())
        saved = stack.enter_context(
            checkpoint.Checkpoints(workdir / "checkpoints", keep=config.keep)
        )
        best = (
            stack.enter_context(checkpoint.Checkpoints(workdir / "best", keep=1))
            if config.best
            else None
        )
        log = stack.enter_context(logs.Log(workdir, start))
        best_score = max(
            [best_score, *(line[config.best] for line in log.kept if config.best in line)]
        )
        log.text("options", config.as_flagfile())
        log.text("environment", environment if first else "")
        stop = stack.enter_context(resume.told_to_stop(config.log_every))

        def embed_unless_stopped(*args):
            if (
                jax.process_count() == 1 and stop(0)
            ):  # an evaluation may take longer than a machine is left; many processes end it together
                raise _Stopped
            return embed_step(*args)

        def end_early(step):
            saved.wait()
            say(
                f"told to stop: saved step {step} of {config.steps}; the same command goes on",
                file=sys.stderr,
            )
            sys.exit(resume.RUN_AGAIN)

        def evaluate_at(step):
            """The test images that could be read, and their embeddings; None where the run was told to stop."""
            nonlocal best_score
            here = runner.to_local(
                state.replace(opt_state=(), memory=None)
            )  # not needed, and large
            try:
                data, levels = scoring.embed_readable(
                    lambda data, on_bad: embed(
                        here, *fed["test"], embed=embed_unless_stopped, on_bad=on_bad
                    ),
                    splits["test"],
                    bad_images.found,
                )
                embeddings = np.asarray(embedding_net.concatenate_levels(levels))
                scores = metrics.retrieval_metrics(
                    *embedding.queries_and_gallery(embeddings, data), ks=ks
                )
            except _Stopped:
                return None
            except logs.BadRun:
                raise
            except ValueError as error:
                raise logs.BadRun(
                    f"step {step}: {error}; where embeddings are not finite or all zero, lower --learning_rate"
                )
            if config.best and config.best not in scores:
                raise logs.BadRun(f"--best={config.best}: expected one of {', '.join(scores)}")
            log.write(step, scores)
            line = "  ".join(
                f"{name} {100 * value:.1f}"
                for name, value in scores.items()
                if "queries" not in name
            )
            if first:
                progress.write(f"step {step}: {line}")
            if config.best and scores[config.best] > best_score:
                best_score = scores[config.best]
                best.save(step, runner.to_global(state))
                best.wait()  # before a checkpoint of this step counts: one that goes on would not save it again
            return data, levels

        # ---- The loop
        with tqdm.tqdm(
            total=config.steps,
            initial=start,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10,
            disable=not first,
        ) as progress:
            evaluated = None
            scored = any(line["step"] == start and "recall@1" in line for line in log.kept)
            if (
                start % config.eval_every == 0 and start < config.steps and not scored
            ):  # at 0, or told to stop before it
                evaluate_at(start) or end_early(start)
            loaded = pipeline.prefetch(
                _batches(
                    prepared,
                    fed["train"],
                    start,
                    functools.partial(bad_images.found, splits["train"]),
                ),
                runner.shard,
            )
            since, waited = (start, time.time()), 0.0
            profiled = (
                tuple(map(int, config.profile_steps.split(":"))) if config.profile_steps else (0, 0)
            )
            longest_before = int(np.asarray(state.skipped)[1])
            for step in range(start + 1, config.steps + 1):
                asked = time.time()
                batch = next(loaded)
                waited += time.time() - asked
                last = step == config.steps
                if step == profiled[0]:
                    jax.profiler.start_trace(str(workdir / "profile"))
                state, measured = train_step(state, batch)
                if start < profiled[0] <= step == min(profiled[1] - 1, config.steps):
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                if step % config.log_every == 0 or last:
                    values = {name: np.asarray(value).tolist() for name, value in measured.items()}
                    in_a_row, longest, skipped = np.asarray(state.skipped).tolist()
                    rate = (step - since[0]) * batches.batch_size / (time.time() - since[1])
                    values |= {
                        "learning_rate": float(rate_at(step - 1 - skipped)),
                        "images_per_second": rate,
                        "seconds_waiting": waited,
                    }
                    values |= {"skipped_steps": skipped} if skipped else {}
                    since, waited = (step, time.time()), 0.0
                    log.write(step, values, {"device_mib": logs.device_mib()})
                    if in_a_row >= config.max_bad_steps or longest > max(
                        longest_before, config.max_bad_steps - 1
                    ):
                        saved.wait()
                        what = [
                            name for name, value in values.items() if not np.isfinite(value).all()
                        ] or ["batch statistics"]
                        until, what = (
                            (f"until step {step}", f" ({', '.join(what)})")
                            if in_a_row
                            else (f"before step {step}", "")
                        )
                        raise logs.BadRun(
                            f"{max(in_a_row, longest)} steps in a row, {until}, had something not finite{what} and changed nothing; "
                            f"the last checkpoint is of step {saved.latest_step() or 0}; lower --learning_rate"
                        )
                    progress.set_postfix_str(
                        f"loss {values['loss']:.4f}, {rate:.0f} images/s", refresh=False
                    )
                progress.update()
                stopping = not last and stop(step)
                if (step % config.eval_every == 0 or last) and not stopping:
                    evaluated = evaluate_at(step)
                    stopping = evaluated is None
                    since, waited = (step, time.time()), 0.0
                if step % config.checkpoint_every == 0 or last or stopping:
                    saved.save(step, runner.to_global(state), {"best_score": best_score})
                if stopping:
                    end_early(step)
            if evaluated is None:  # the run had ended before: measured again for the report
                evaluated = evaluate_at(config.steps) or end_early(config.steps)

    # ---- What is left to the user
    if first:
        _finish(config, workdir, *evaluated, ks)
    multihost_utils.sync_global_devices("done")


def _finish(config, workdir, test, levels, ks) -> None:
    table = scoring.score_table(levels, test, ks, clustering=False)
    if config.report:
        from experiments.engine import report

        print("writing the report ...", flush=True)
        report.write(
            workdir / "report.html",
            title=f"Retrieval on unseen classes: {workdir.name}",
            lines=[
                json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
            ],
            config=config,
            test=test,
            embeddings=np.asarray(embedding_net.concatenate_levels(levels)),
            table=table,
        )
    *_, final = table.values()
    recalls = "  ".join(f"Recall@{k} {100 * final[f'recall@{k}']:.1f} %" for k in ks)
    print(f"Recall@K on {len(np.unique(test.labels))} classes never trained on: {recalls}")
    if config.report:
        print(f"report: {workdir / 'report.html'}")


class _Stopped(Exception):
    """SIGTERM came in the middle of an evaluation."""
