"""The options of a run: one frozen dataclass, checked once; its fields are the flags of every experiment."""

import contextlib
import dataclasses
import pathlib
import re
import sys
import uuid

from absl import flags, logging

from experiments.engine import datasets, losses
from rll_jax.networks import backbones, embedding_net
from rll_jax.typing import Backbone

# How a run is carried out, not what comes out of it: these may change when it is resumed.
FREE_TO_CHANGE = (
    "data_dir",
    "workdir",
    "threads",
    "worker_processes",
    "checkpoint_every",
    "keep",
    "log_every",
    "report",
    "verify_images",
    "max_bad_images",
    "compilation_cache",
    "max_bad_steps",
    "profile_steps",
    "dry_run",
    "multihost",
    "coordinator_address",
    "num_processes",
    "process_id",
)


_STEMS = {
    "7x7": {"small_images": False, "stem_pool": 1},
    "3x3": {"small_images": True, "stem_pool": 1},
    "3x3_pooled": {"small_images": True, "stem_pool": 2},
}  # of a `ResNetConfig`


def _option(default, help, **limits):
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True)
class Config:
    """Raises ValueError, naming the flag, where an option is out of range or two do not go together."""

    dataset: str = _option(
        "emoji",
        f"set of pictures: {', '.join(datasets.SOURCES)}, or tfds:NAME of tensorflow-datasets",
    )
    data_dir: str = _option(
        "",
        "folder of the data, of published files or prepared; empty for the set that comes with the project",
    )
    index: str = _option(
        "",
        "table of the folder's pictures, .csv or .parquet, with the columns path, label and, by option, split (folder)",
    )
    test_share: float = _option(
        0.5,
        "share of the classes that is searched, where nothing else says which (folder)",
        low=0.01,
        high=0.99,
    )
    split_seed: int = _option(0, "seed that draws them (folder)", low=0)
    validation_share: float = _option(
        0.0,
        "share of the training classes to search instead of the test classes, which are not looked at: to choose options by; the rest "
        "trains",
        low=0,
        high=0.9,
    )
    image_key: str = _option("image", "feature that holds the picture (tfds)")
    label_key: str = _option("", "feature that holds the class (tfds); empty: label or class_id")
    workdir: str = _option(
        "runs/run", "folder for everything the run writes; resumed if it holds the same run"
    )
    steps: int = _option(1000, "training steps", low=1)
    seed: int = _option(0, "seed of the parameters, the batches and the augmentation", low=0)
    classes_per_batch: int = _option(40, "P, classes of a batch", low=2)
    images_per_class: int = _option(4, "K, images of each", low=2)
    loss: str = _option(
        "ranked_list",
        "what is trained; the options from --alpha to --gallery_gradient are of ranked_list, and others have --loss_options",
        choices=tuple(losses.LOSSES),
    )
    loss_options: str = _option(
        "",
        "of another --loss, such as margin=0.1,mining=hard: the arguments of its function in rll_jax.loss.baselines",
    )
    proxy_lr_multiplier: float = _option(1.0, "of the rate of the proxies (proxy_anchor)", low=0)
    alpha: float = _option(1.2, "negatives' boundary", low=1e-6, high=2)
    margin: float = _option(0.4, "alpha - margin is the positives' boundary", low=0)
    temperature_pos: float = _option(0.0, "T_p of the positives' weights", low=0)
    temperature_neg: float = _option(10.0, "T_n of the negatives' weights", low=0)
    balance: float = _option(
        0.5, "share of the negative term: lambda / (1 + lambda) of the CVPR paper", low=0, high=1
    )
    pair_term: str = _option(
        "distance",
        "the hinge of a pair: on the distance, or on half of its square (2019 layer)",
        choices=("distance", "squared"),
    )
    query_weighting: str = _option(
        "uniform",
        "queries alike, or by the mass of their pairs' weights (released layers)",
        choices=("uniform", "mass"),
    )
    weight_gradient: bool = _option(False, "differentiate the weights too, as other ports do")
    gallery_gradient: bool = _option(
        False, "move the gallery too, not the query alone (the paper's code)"
    )
    memory_size: int = _option(
        0,
        "embeddings of each level kept from the last batches and ranked too, those of this batch among them (cross-batch memory); "
        "0: the batch alone",
        low=0,
    )
    class_augment: bool = _option(
        False, "turn, mirror and recolour all images of a class in a batch alike"
    )
    augment: str = _option(
        "",
        "view of a training picture, and the test view that goes with it; empty: what is usual for the set",
        choices=("", *datasets.VIEWS),
    )
    sampling: str = _option(
        "classes",
        "batches of P classes x K images; the same with classes of few super classes; or images in random order, each with "
        "--min_positives others of its class, P x K in all",
        choices=("classes", "hierarchical", "shuffle"),
    )
    super_classes_per_batch: int = _option(
        2, "of which a batch's classes come (hierarchical)", low=1
    )
    min_positives: int = _option(1, "of each image drawn (shuffle)", low=1)
    class_on_one_device: bool = _option(
        False,
        "keep a class's images together where devices share a batch; otherwise they are spread",
    )
    backbone: str = _option("resnet_small", "network", choices=tuple(backbones.BACKBONES))
    stem: str = _option(
        "",
        "of a ResNet: 7x7 of stride 2 and a max pool, or for small images 3x3 of stride 1, as it is or with a 2x2 average pool; empty: "
        "the network's own",
        choices=("", *_STEMS),
    )
    width: int = _option(
        0,
        "channels of a ResNet's first stage, doubled from stage to stage; 0: the network's own",
        low=0,
    )
    stage_sizes: str = _option(
        "", "blocks of each stage of a ResNet, such as 2,2,2,2; empty: the network's own"
    )
    pretrained: str = _option(
        "",
        "weights to start from: .safetensors, .pth or .npz in the names of torchvision and timm, another run's workdir, or a "
        "repository of the Hugging Face hub such as timm/resnet50.tv_in1k",
    )
    pretrained_head: bool = _option(False, "take the embedding layers of --pretrained too")
    init_from: str = _option(
        "", "another run's workdir, with whose weights to start, the embedding layers' too"
    )
    embedding_dim: int = _option(128, "dimension of each level's embedding", low=1)
    levels: str = _option(
        "H", "levels of the network with an embedding and a loss each, such as L,M,H"
    )
    batch_norm: str = _option(
        "train",
        "the backbone's statistics: of the batch over all devices, of each device's share, or the running ones; "
        "frozen_affine fixes scale and bias too",
        choices=embedding_net.BATCH_NORMS,
    )
    dtype: str = _option("float32", "of the convolutions", choices=("float32", "bfloat16"))
    frozen_stages: int = _option(
        0,
        "first stages of the network, and the stem, that stay as they are; needs a frozen --batch_norm",
        low=0,
    )
    frozen_views: int = _option(
        0,
        "views of each training picture that --frozen_stages see, once, before the first step: what they make of them is kept in --data_dir "
        "and read at every step after; 0: they see a new view at each step",
        low=0,
    )
    remat: str = _option("", "stages computed again for the gradient to save memory, such as 1,2")
    image_size: int = _option(32, "side of the pictures that the network sees, pixels", low=8)
    optimizer: str = _option("adamw", "optimiser; sgd has momentum 0.9", choices=("adamw", "sgd"))
    learning_rate: float = _option(2e-3, "highest learning rate", low=1e-12)
    head_lr_multiplier: float = _option(
        1.0, "of the rate of the embedding layers, heads L, M and H", low=0
    )
    weight_decay: float = _option(0.05, "AdamW's decoupled decay, or SGD's L2 penalty", low=0)
    decay_norm_and_bias: bool = _option(False, "decay the scales and biases too")
    clip_gradient: float = _option(0.0, "largest norm of the gradient; 0: any", low=0)
    ema: float = _option(
        0.0,
        "decay of a moving average of the parameters, which is then evaluated; 0: none",
        low=0,
        high=0.999999,
    )
    schedule: str = _option(
        "cosine", "cosine with warm-up, or steps at --decay_at", choices=("cosine", "step")
    )
    warmup: float = _option(
        0.1, "share of the steps in which the rate rises (cosine)", low=0, high=0.99
    )
    decay_at: str = _option(
        "", "steps at which the rate is multiplied by --decay_factor (step), such as 5000,10000"
    )
    decay_factor: float = _option(0.5, "see --decay_at", low=0)
    eval_every: int = _option(
        200, "steps between evaluations; the first and the last step are evaluated too", low=1
    )
    eval_batch_size: int = _option(256, "images embedded at a time", low=1)
    checkpoint_every: int = _option(
        100, "steps between checkpoints; the last step is saved too", low=1
    )
    keep: int = _option(2, "checkpoints kept", low=1)
    best: str = _option(
        "recall@1", "score by which the best checkpoint is kept too, in best/; empty: none"
    )
    max_bad_steps: int = _option(
        10, "steps in a row that may go without an update because something was not finite", low=1
    )
    log_every: int = _option(10, "steps between lines of metrics", low=1)
    report: bool = _option(True, "write the page of pictures at the end")
    threads: int = _option(2, "threads that read and augment, in each process", low=1)
    worker_processes: int = _option(
        0, "processes beside this one that read and augment; 0: threads alone", low=0
    )
    cache: str = _option(
        "none",
        "keep the decoded pictures, shrunk to what the views need, in memory or in --data_dir",
        choices=("none", "memory", "disk"),
    )
    verify_images: str = _option(
        "quick",
        "before the first step: that files are there and not empty, or that all decode",
        choices=("quick", "full"),
    )
    on_bad_image: str = _option(
        "stop",
        "what to do where such a check finds any; skip lists them in the workdir",
        choices=("stop", "skip"),
    )
    max_bad_images: int = _option(
        100,
        "pictures that may turn out broken in the middle of a run, where others of their class replace them",
        low=0,
    )
    compilation_cache: bool = _option(
        True, "keep compiled programs in the workdir, for a run that goes on"
    )
    embed_chunk: int = _option(
        0,
        "images of a device in the network at a time, for batches beyond its memory; 0: all",
        low=0,
    )
    profile_steps: str = _option(
        "", "A:B: write a JAX profile of steps A to B - 1 into the workdir"
    )
    dry_run: bool = _option(
        False, "build and compile everything, tell what a step takes, and stop; nothing is written"
    )
    multihost: bool = _option(
        False,
        "one of many processes: found by itself on TPU pods, Slurm and GKE, elsewhere by the next three",
    )
    coordinator_address: str = _option("", "HOST:PORT of process 0 (multihost)")
    num_processes: int = _option(0, "in all (multihost)", low=0)
    process_id: int = _option(-1, "of this one, from 0 (multihost)", low=-1)
    parallel: str = _option(
        "pmap", "how a step runs over the devices", choices=("pmap", "shard_map")
    )

    def __post_init__(self):
        if not datasets.is_known(self.dataset):
            raise ValueError(
                f"--dataset={self.dataset}: expected {', '.join(datasets.SOURCES)} or {datasets.TFDS}NAME"
            )
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            if "choices" in limits and value not in limits["choices"]:
                raise ValueError(
                    f"--{field.name}={value}: expected one of {', '.join(limits['choices'])}"
                )
            low, high = limits.get("low", float("-inf")), limits.get("high", float("inf"))
            if ("low" in limits or "high" in limits) and not low <= value <= high:
                expected = (
                    f"at least {low}" if high == float("inf") else f"between {low} and {high}"
                )
                raise ValueError(f"--{field.name}={value}: expected {expected}")
        if not self.margin <= self.alpha:
            raise ValueError(f"--margin={self.margin} must not be above --alpha={self.alpha}")
        losses.read_options(self.loss, self.loss_options)
        if unused := losses.ignored(
            self, {field.name: field.default for field in dataclasses.fields(self)}
        ):
            raise ValueError(f"--{unused[0]} does nothing with --loss={self.loss}: leave it out")
        if self.memory_size and self.loss != "ranked_list":
            raise ValueError(
                f"--memory_size={self.memory_size} goes with --loss=ranked_list, not {self.loss}"
            )
        for name in ("gallery_gradient", "class_augment"):
            if self.memory_size and getattr(self, name):
                why = (
                    "what is remembered is constant"
                    if name == "gallery_gradient"
                    else "a class would look another way in each batch"
                )
                raise ValueError(
                    f"--memory_size={self.memory_size} and --{name}: {why}; give one of them"
                )
        wrong = [level for level in self.level_names if level not in embedding_net.LEVELS]
        if wrong or len(set(self.level_names)) != len(self.level_names):
            raise ValueError(
                f"--levels={self.levels}: expected some of L,M,H, each once, with commas between"
            )
        for name in ("decay_at", "remat", "stage_sizes"):
            if not all(
                number.strip().isdecimal()
                for number in getattr(self, name).split(",")
                if getattr(self, name)
            ):
                raise ValueError(
                    f"--{name}={getattr(self, name)}: expected numbers with commas between"
                )
        stages = self.network.num_stages
        if stages < len(embedding_net.LEVELS) - embedding_net.LEVELS.index(self.level_names[0]):
            raise ValueError(
                f"--levels={self.levels}: --backbone={self.backbone} has only {stages} stages"
            )
        if not set(self.numbers("remat")) <= set(range(1, stages + 1)):
            raise ValueError(
                f"--remat={self.remat}: the stages of --backbone={self.backbone} are 1 to {stages}"
            )
        if (
            self.frozen_stages > stages
            or self.frozen_stages
            and not self.batch_norm.startswith("frozen")
        ):
            raise ValueError(
                f"--frozen_stages={self.frozen_stages}: expected at most the {stages} stages of --backbone={self.backbone}, and "
                "--batch_norm=frozen or frozen_affine"
            )
        if self.frozen_views:
            if not self.frozen_stages:
                raise ValueError(
                    f"--frozen_views={self.frozen_views} keeps what frozen stages make of a picture: give --frozen_stages too"
                )
            for name in ("class_augment", "worker_processes", "dry_run", "multihost"):
                if getattr(self, name):
                    raise ValueError(
                        f"--frozen_views={self.frozen_views} and --{name} do not go together: leave one of them out"
                    )
            if self.on_bad_image == "skip" and self.verify_images != "full":
                raise ValueError(
                    f"--frozen_views={self.frozen_views} and --on_bad_image=skip: give --verify_images=full, no picture is replaced later"
                )
        if self.index and self.dataset != "folder":
            raise ValueError(f"--index={self.index} goes with --dataset=folder, not {self.dataset}")
        if self.init_from and self.pretrained:
            raise ValueError(
                f"--init_from={self.init_from} and --pretrained={self.pretrained}: give one of them"
            )
        if self.profile_steps:
            found = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
            if not found or not 0 < int(found[1]) < int(found[2]):
                raise ValueError(
                    f"--profile_steps={self.profile_steps}: expected A:B with A below B, such as 10:15"
                )
        given = [bool(self.coordinator_address), self.num_processes > 0, self.process_id >= 0]
        if any(given) and not (self.multihost and all(given)):
            raise ValueError(
                "--coordinator_address, --num_processes and --process_id go together, with --multihost"
            )

    @property
    def level_names(self) -> tuple[str, ...]:
        return tuple(
            sorted(
                self.levels.split(","),
                key=lambda name: (embedding_net.LEVELS + (name,)).index(name),
            )
        )

    @property
    def network(self) -> Backbone:
        """--backbone, with --stem, --width and --stage_sizes."""
        network = backbones.BACKBONES[self.backbone]
        given = {"width": self.width, "stage_sizes": self.numbers("stage_sizes")}
        changes = {name: value for name, value in given.items() if value} | _STEMS.get(
            self.stem, {}
        )
        if not isinstance(network, backbones.ResNetConfig):
            if not changes:
                return network
            raise ValueError(
                f"--stem, --width and --stage_sizes are of ResNets, and --backbone={self.backbone} is none"
            )
        try:
            return dataclasses.replace(network, **changes)
        except ValueError as error:
            raise ValueError(f"--{error}")

    def numbers(self, name: str) -> tuple[int, ...]:
        """Those of an option that holds them with commas between."""
        return tuple(int(number) for number in getattr(self, name).split(",") if number)

    def as_flagfile(self) -> str:
        return "".join(f"--{name}={value}\n" for name, value in dataclasses.asdict(self).items())


def define_flags(only: tuple[str, ...] = (), flag_values=flags.FLAGS, **defaults) -> None:
    """Defines a flag for each option, or for those named, with an experiment's own defaults."""
    define = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        bool: flags.DEFINE_bool,
    }
    for field in dataclasses.fields(Config):
        if only and field.name not in only:
            continue
        choices = field.metadata.get("choices")
        text = field.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        define[field.type](
            field.name, defaults.get(field.name, field.default), text, flag_values=flag_values
        )


def parse_flags(argv) -> list[str]:
    """absl's parser for `app.run`, with one line and exit code 2 for a mistake."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(_usage_error(argv[0], " ".join(str(error).split()) + _where(argv, error)))
    if len(rest) > 1:
        sys.exit(
            _usage_error(
                argv[0], f"unexpected argument {rest[1]!r}: options are written --name=value"
            )
        )
    return rest


def from_flags(flag_values=flags.FLAGS) -> Config:
    names = [field.name for field in dataclasses.fields(Config) if field.name in flag_values]
    return Config(**{name: flag_values[name].value for name in names})


def from_flagfile(path: pathlib.Path) -> Config:
    """The options of a run from its flags.txt; raises ValueError where that is not one."""
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    options = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, equals, value = line.removeprefix("--").partition("=")
        if name not in types or not equals:
            raise ValueError(
                f"{path}, line {number}: expected --option=value of an experiment, found {line!r}"
            )
        try:
            options[name] = value == "True" if types[name] is bool else types[name](value)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {line!r}: {error}")
    return Config(**options)


@contextlib.contextmanager
def mistakes_in_one_line():
    """Ends the program with 2 and one line where what the user gave is at fault."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    logging.set_verbosity(logging.ERROR)  # orbax tells of all it does, warns where it reads only
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def check_free(name: str, path: pathlib.Path) -> None:
    """Raises ValueError where a file to be written, of the flag `name`, is there already or its folder is not."""
    if path.exists():
        raise ValueError(f"--{name}={path} exists: choose another name")
    if not path.parent.is_dir():
        raise ValueError(f"--{name}={path}: no folder {path.parent}")


@contextlib.contextmanager
def written_whole(path: pathlib.Path):
    """A path to write to, which takes the place of `path` at the end, or goes where that fails."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def fail(error) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _usage_error(program: str, message: str) -> int:
    print(f"{pathlib.Path(program).stem}: {message}", file=sys.stderr)
    return 2


def _where(argv, error) -> str:
    """The flagfile that holds an unknown flag, to be found by whoever mends it."""
    name = getattr(error, "flagname", "")
    for argument in argv[1:]:
        key, _, value = argument.lstrip("-").partition("=")
        path = pathlib.Path(value)
        if name and key == "flagfile" and path.is_file():
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
                if line.strip().lstrip("-").partition("=")[0] == name:
                    return f" ({path}, line {number})"
    return ""
