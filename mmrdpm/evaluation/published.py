"""The suite `imagenet`: FID, Inception score, precision and recall as papers print them.

All of it by `torch-fidelity`, whose Inception agrees with that of the original code. The library
unpickles weights; they are read as plain tensors here first, and only those are handed on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor

from mmrdpm import hub
from mmrdpm.api import Model
from mmrdpm.data.pictures import contact_sheet, open_picture, stored_size
from mmrdpm.errors import CheckpointError, DataError
from mmrdpm.evaluation.figure import Figure, digest
from mmrdpm.evaluation.part import Part, Shown, strips
from mmrdpm.evaluation.store import OWN_NOISE, Store, picture_seeds, read_lines
from mmrdpm.evaluation.suite import ImagenetSuite
from mmrdpm.metrics.distance import frechet_interval
from mmrdpm.metrics.features import MissingEvaluator, sha256_of
from mmrdpm.metrics.proportion import Proportion
from mmrdpm.sampling.image import Guided

_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_WEIGHTS}"
_SUFFIXES = {".png", ".jpg", ".jpeg"}
_BATCH = 64  # pictures through Inception at once
_SPLITS = 10  # of the Inception score
_NEIGHBOURS = 3  # of precision and recall
_LEAST = {  # pictures
    "fid": 2,
    "inception_score": _SPLITS,
    "precision_recall": _NEIGHBOURS + 1,
    "guidance": _NEIGHBOURS + 1,
}
_SHOWN, _COLUMNS, _STRIPS = 32, 8, 3
_KINDS = ("pooled", "logits")

Features = tuple[Tensor, Tensor]
"""Pooled features `[n, 2048]` and logits without their bias `[n, 1008]`."""


class ImagenetEvaluation:
    """One suite over one model.

    Raises:
        DataError: the model draws another size, the data or weights are not where the suite
            says, or a real picture is of another size or has no header that can be read; before
            anything is drawn.
        UsageError: a prompt is too long for the model.
    """

    def __init__(self, model: Model, suite: ImagenetSuite, store: Store) -> None:
        self.model, self.suite, self.store = model, suite, store
        self.how = model.sampling.at(suite.guidance_scale)
        size = model.images.image_size
        if size != suite.resolution:
            raise DataError(
                f"mismatched resolutions: the suite is for {suite.resolution}x{suite.resolution},"
                f" the model draws {size}x{size}: set resolution={size} and a reference of that"
                " size, or use another model"
            )
        self.prompts = read_lines(Path(suite.prompts))
        for prompt in self.prompts:
            model.prompt_ids(prompt)  # refuses what is too long
        for metric in suite.metrics:
            key = "guidance_samples" if metric == "guidance" else "samples"
            if (count := getattr(suite, key)) < _LEAST[metric]:
                raise DataError(
                    f"{metric} needs at least {_LEAST[metric]} pictures, not {count} samples:"
                    f" raise {key}"
                )
        self.reference = self._checked_reference()
        device = model.transformer.table.weight.device
        self.inception = Inception(_inception_file(suite.inception), device)

    def parts(self) -> Iterator[Part]:
        """Everything to compute, in order."""
        makes = {
            "fid": self.fid,
            "inception_score": self.inception_score,
            "precision_recall": self.precision_recall,
            "guidance": self.guidance,
        }
        for metric in self.suite.metrics:
            of = self._protocol(metric)
            if metric == "guidance":
                of["guidance_scales"] = self.suite.guidance_scales
            yield Part(metric, of, makes[metric])

    def fid(self) -> list[Figure]:
        """Heusel et al. 2017 (arXiv 1706.08500); its interval is over the drawn samples."""
        from torch_fidelity import metric_fid

        drawn, real = self._pooled
        statistics = [metric_fid.fid_features_to_statistics(x) for x in (drawn, real)]
        value = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
        fid = value[metric_fid.KEY_METRIC_FID]
        few = min(len(drawn), len(real)) <= drawn.shape[1]
        note = f"biased upwards: fewer samples than the {drawn.shape[1]} features" if few else ""
        progress = partial(self.store.progress, "interval of FID")
        interval = frechet_interval(drawn, real, fid, progress=progress)
        return [self._figure("fid", "FID", fid, interval, note)]

    def inception_score(self) -> list[Figure]:
        """Salimans et al. 2016 (arXiv 1606.03498): the mean of 10 splits, and its interval."""
        from torch_fidelity import metric_isc

        found = metric_isc.isc_features_to_metric(self._drawn[1], _SPLITS)
        mean = found[metric_isc.KEY_METRIC_ISC_MEAN]
        # Student's t of 9 degrees of freedom; the library's deviation divides by 10, not by 9
        half = 2.262157 * found[metric_isc.KEY_METRIC_ISC_STD] / (_SPLITS - 1) ** 0.5
        interval = (min(mean, max(1.0, mean - half)), mean + half)  # below 1 by rounding alone
        return [self._figure("inception_score", "Inception score", mean, interval)]

    def precision_recall(self) -> list[Figure]:
        """Kynkäänniemi et al. 2019 (arXiv 1904.06991), 3 neighbours, on Inception features."""
        found = precision_recall(*self._pooled).items()
        return [self._share("precision_recall", name, share) for name, share in found]

    def guidance(self) -> list[Figure]:
        """Precision and recall against the guidance scale.

        From fewer samples than the whole figures, and so with a coarser manifold of them.
        """
        real, figures = self._real[0], []
        for scale in self.suite.guidance_scales:
            files = self._draw(self.suite.guidance_samples, self.model.sampling.at(scale))
            drawn, _ = self._features(f"guidance {scale:g}", files)
            for name, share in precision_recall(drawn, real).items():
                figure = self._share("guidance", f"{name} at guidance {scale:g}", share)
                protocol = {**figure.protocol, "guidance_scale": scale}
                figures.append(replace(figure, protocol=protocol))
        return figures

    def shown(self) -> Iterator[Shown]:
        """Pictures for the report."""
        if self.suite.metrics == ("guidance",):
            return  # it draws others, of many scales
        made = [open_picture(path) for path in self._files[:_SHOWN]]
        rows = [made[i : i + _COLUMNS] for i in range(0, len(made), _COLUMNS)]
        yield Shown("Drawn", contact_sheet(rows))
        few = self.prompts[:_STRIPS]
        yield strips(
            self.model,
            few,
            picture_seeds(self.suite.seed, len(few)),
            guidance_scale=self.how.guidance_scale,
        )

    @cached_property
    def _files(self) -> list[Path]:
        return self._draw(self.suite.samples, self.how)

    def _draw(self, count: int, how: Guided) -> list[Path]:
        """Drawn pictures; the seeds of round r of the prompts follow from `seed + r`."""
        files: list[Path] = []
        draw = partial(self.model.generate, guidance_scale=how.guidance_scale)
        while missing := count - len(files):
            seed = self.suite.seed + len(files) // len(self.prompts)
            prompts = self.prompts[:missing]
            title = f"drawing {len(files) + len(prompts)} of {count}"
            files += self.store.draw(title, prompts, seed, asdict(how), draw)
        return files

    @property
    def _pooled(self) -> tuple[Tensor, Tensor]:
        """Drawn and real; the real ones first, so that a damaged one is found before drawing."""
        real = self._real[0]
        return self._drawn[0], real

    @cached_property
    def _drawn(self) -> Features:
        return self._features("drawn", self._files)

    @cached_property
    def _real(self) -> Features:
        return self._features("reference", self.reference)

    def _features(self, what: str, files: Sequence[Path]) -> Features:
        """Kept batch by batch."""
        size = self.suite.resolution
        batches = [files[i : i + _BATCH] for i in range(0, len(files), _BATCH)]
        found = []
        for batch in self.store.progress(f"features, {what}", batches):
            of = [self.inception.protocol, [sha256_of(path) for path in batch]]

            def make(batch: Sequence[Path] = batch) -> dict[str, Tensor]:
                return dict(zip(_KINDS, self.inception(read_batch(batch, size)), strict=True))

            found.append(self.store.tensors(f"features, {what}", of, make))
        pooled, logits = (torch.cat([one[kind] for one in found]) for kind in _KINDS)
        return pooled, logits

    def _checked_reference(self) -> list[Path]:
        """The real pictures; none where no metric looks at them."""
        compared = [metric for metric in self.suite.metrics if metric != "inception_score"]
        if not compared:
            return []
        files = pictures_in(Path(self.suite.reference))
        needed = max(_LEAST[metric] for metric in compared)
        if len(files) < needed:
            raise DataError(
                f"{', '.join(compared)} need at least {needed} pictures on each side, but"
                f" {self.suite.reference} holds {len(files)}: add to the reference"
            )
        for path in files:
            _check_size(path, stored_size(path), self.suite.resolution)
        return files

    def _protocol(self, metric: str) -> dict:
        if metric == "inception_score":
            return {**self._drawing, "splits": _SPLITS}
        neighbours = {} if metric == "fid" else {"neighbours": _NEIGHBOURS}
        count = {"count": self.suite.guidance_samples} if metric == "guidance" else {}
        return {**self._drawing, **self._compared, **neighbours, **count}

    @cached_property
    def _drawing(self) -> dict:
        return {
            **self.inception.protocol,
            **asdict(self.how),
            "seed": self.suite.seed,
            "noise": OWN_NOISE,
            "count": self.suite.samples,
            "resolution": self.suite.resolution,
            "prompts_sha256": digest(self.prompts),
        }

    @cached_property
    def _compared(self) -> dict:
        return {
            "reference": len(self.reference),
            "reference_sha256": digest([sha256_of(path) for path in self.reference]),
        }

    def _figure(
        self, metric: str, name: str, value: float, interval: tuple[float, float], note: str = ""
    ) -> Figure:
        protocol = self._protocol(metric)
        full = f"drawn/imagenet/{name}"
        return Figure(full, float(value), interval, "", protocol["count"], protocol, note)

    def _share(self, metric: str, name: str, found: Proportion) -> Figure:
        """Counted are the pictures that it is a share of: the real ones for recall."""
        figure = self._figure(metric, name, found.share, found.interval)
        return replace(figure, unit="share", count=found.count)


def precision_recall(drawn: Tensor, real: Tensor) -> dict[str, Proportion]:
    """Of features `[n, F]` and `[m, F]`: shares of the drawn and of the real pictures."""
    from torch_fidelity import metric_prc

    found = metric_prc.prc_features_to_metric(
        drawn, real, prc_neighborhood=_NEIGHBOURS, save_cpu_ram=True, verbose=False
    )
    of = {"precision": len(drawn), "recall": len(real)}
    return {name: Proportion(round(found[name] * n), n) for name, n in of.items()}


class Inception:
    """Pictures -> pooled features and logits, by torch-fidelity.

    Raises:
        MissingEvaluator: the library or the weights are missing.
        DataError: the weights are damaged, or hold more than tensors.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises both
            raise MissingEvaluator(
                f"the published scores need torch-fidelity ({' '.join(str(error).split())}): pip"
                " install 'mmrdpm[published]', with a torchvision that fits torch"
            ) from None
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "inception.pth"
            torch.save(read_weights(weights), plain)
            try:
                self.network = FeatureExtractorInceptionV3(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=str(plain),
                )
            except RuntimeError as error:
                raise DataError(f"{weights}: not Inception weights: {_first(error)}") from None
        self.device = device
        self.network.to(device)
        self.protocol = {
            "evaluator": "torch-fidelity inception-v3-compat",
            "evaluator_version": version("torch-fidelity"),
            "evaluator_sha256": sha256_of(weights),
            "preprocessing": "uint8 RGB, bilinear as in TensorFlow 1 to 299x299",
        }

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        """uint8 `[n, 3, H, W]`."""
        pooled, logits = self.network(pictures.to(self.device))
        return pooled.cpu(), logits.cpu()


def _inception_file(place: str) -> Path:
    if Path(place).is_file():
        return Path(place)
    mend = f"download {_URL} and give its place as inception=PATH"
    if not hub.is_id(place):
        raise MissingEvaluator(f"{place}: no Inception weights: {mend}")
    try:
        return hub.fetch(place, [_WEIGHTS]) / _WEIGHTS
    except CheckpointError as error:
        raise MissingEvaluator(f"{error}; or {mend}") from None


def pictures_in(folder: Path) -> list[Path]:
    """The PNG and JPEG files under a folder, sorted.

    Raises:
        MissingEvaluator: there is no such folder, or no picture in it.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not found:
        raise MissingEvaluator(
            f"{folder}: no pictures: put the real pictures there as PNG or JPEG files, or give"
            " their place as reference=DIR"
        )
    return found


def read_batch(files: Sequence[Path], size: int) -> Tensor:
    """uint8 `[n, 3, size, size]`.

    Raises:
        DataError: a picture is damaged or of another size.
    """
    pictures = []
    for path in files:
        picture = open_picture(path)
        _check_size(path, picture.size, size)
        pictures.append(np.asarray(picture))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _check_size(path: Path, found: tuple[int, int], size: int) -> None:
    if found != (size, size):
        raise DataError(
            f"{path}: mismatched resolutions: {found[0]}x{found[1]}, the suite is for"
            f" {size}x{size}: resize the reference as the paper you compare with does"
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch saved.

    Raises:
        DataError: it is damaged, or holds more than tensors.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"{path}: not plain weights: {_first(error)}") from None


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
