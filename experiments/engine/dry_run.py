"""--dry_run: builds and compiles everything, and prints what a step takes."""

import time

import jax

from experiments.engine import network_inputs, run_parts
from experiments.engine.checks import CheckedRun


def print_costs(checked: CheckedRun) -> None:
    """Compiles a step and prints its batch, its operations and its memory."""
    config, splits, runner = checked.config, checked.splits, checked.runner
    state = run_parts.fresh_state(checked)
    state, inputs = network_inputs.make_inputs(config, splits, runner, state)
    batch = next(run_parts.train_batches(checked, inputs["train"], 0))
    begin = time.time()
    step = runner.train(run_parts.make_train_step(config, splits["train"].labels))
    compiled = step.lower(state, runner.shard(batch)).compile()
    seconds = time.time() - begin
    count = sum(parameter.size for parameter in jax.tree.leaves(state.params))
    levels = ",".join(config.network.levels)
    print(f"data: {len(splits['train'])} train images, {len(splits['test'])} test images")
    print(f"network: {config.network.backbone}, levels {levels}: {count:,} parameters")
    for name, array in batch.items():
        print(
            f"batch, {name}: {array.shape} {array.dtype} in this process, of {jax.process_count()}"
        )
    flops = (compiled.cost_analysis() or {}).get("flops", 0)
    print(
        f"step, compiled in {seconds:.1f} s for {runner.num_devices} devices: "
        f"{flops / 1e9:.2f} GFLOP on each"
    )
    if (memory := compiled.memory_analysis()) is not None:
        parts = {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "results": memory.output_size_in_bytes,
        }
        sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in parts.items())
        print(f"memory of each device: {sizes}")
    print("dry run: nothing was trained, and nothing written into the workdir")
