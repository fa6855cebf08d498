"""The data sets of the papers: one row each, and the words of PGN's twelve.

Sizes are those of the published splits. They are held against what is found, and a difference is
said: PGN's are Zhou et al.'s (arXiv:2109.01134, appendix) and the data sets' own, VTAB's those of
TensorFlow Datasets by the benchmark's rules (arXiv:1910.04867; google-research/task_adaptation),
FGVC's those of Jia et al. (arXiv:2203.12119, appendix).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_PGN_CLASSES = Path(__file__).with_name("pgn_classes.json")


class Sizes(NamedTuple):
    """Images of the published splits; None where there is no such split."""

    train: int
    validation: int | None
    test: int


@dataclass(frozen=True)
class DataSet:
    """A data set with its protocol.

    Attributes:
        name: as in ``--dataset``.
        reader: the kind of files, a key of ``readers.READERS``.
        folders: what its folder or zip file below ``--data-dir`` may be called.
        num_classes: C.
        sizes: images of its splits.
        source: where the files come from, and which of them are read.
        file: the reader's own: a split file's name, torchvision's class, the folder of images.
        metric: what the papers report: top-1 accuracy, as their code computes it.
        group: VTAB's three.
    """

    name: str
    reader: str
    folders: tuple[str, ...]
    num_classes: int
    sizes: Sizes
    source: str
    file: str = ""
    metric: str = "top1"
    group: str = ""

    @property
    def template(self) -> str | None:
        """The sentence around a class's name in the paper; None where it uses no words."""
        return None if self.suite != "pgn" else pgn_words(self.short)["template"]

    @property
    def suite(self) -> str:
        """ "pgn", "vtab" or "fgvc"."""
        return self.name.partition("/")[0]

    @property
    def short(self) -> str:
        """The name without the suite's."""
        return self.name.partition("/")[2]


def pgn_words(name: str) -> dict[str, Any]:
    """Template, class names in label order and their source, of one of PGN's data sets.

    Raises:
        KeyError: it is none of them.
    """
    found: dict[str, Any] = _pgn_classes()[name]
    return found


@functools.cache
def _pgn_classes() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_PGN_CLASSES.read_text(encoding="utf-8"))["sets"]
    return content


_COOP = "images and {} as in DATASETS.md of github.com/KaiyangZhou/CoOp"
# name, folders, classes, split file, sizes
_ZHOU = (
    ("dtd", ("dtd",), 47, "split_zhou_DescribableTextures.json", (2820, 1128, 1692)),
    ("eurosat", ("eurosat",), 10, "split_zhou_EuroSAT.json", (13500, 5400, 8100)),
    (
        "flowers102",
        ("flowers102", "oxford_flowers"),
        102,
        "split_zhou_OxfordFlowers.json",
        (4093, 1633, 2463),
    ),
    ("food101", ("food101", "food-101"), 101, "split_zhou_Food101.json", (50500, 20200, 30300)),
    ("oxford_pets", ("oxford_pets",), 37, "split_zhou_OxfordPets.json", (2944, 736, 3669)),
    ("sun397", ("sun397",), 397, "split_zhou_SUN397.json", (15880, 3970, 19850)),
    ("ucf101", ("ucf101",), 101, "split_zhou_UCF101.json", (7639, 1898, 3783)),
)
_PGN = (
    *(
        DataSet(f"pgn/{name}", "zhou", folders, count, Sizes(*sizes), _COOP.format(file), file)
        for name, folders, count, file, sizes in _ZHOU
    ),
    DataSet(
        "pgn/resisc45",
        "zhou",
        ("resisc45", "NWPU-RESISC45"),
        45,
        Sizes(18900, 6300, 6300),
        "NWPU-RESISC45's class folders in images/, and resisc45_json.json of "
        "github.com/jochemloedeman/PGN (data/resisc45)",
        "resisc45_json.json",
    ),
    DataSet(
        "pgn/clevr_count",
        "clevr",
        ("clevr", "clevr/CLEVR_v1.0", "CLEVR_v1.0"),
        8,
        Sizes(70000, None, 15000),
        "CLEVR_v1.0 of cs.stanford.edu/people/jcjohns/clevr, with its images/ and scenes/",
    ),
    *(
        DataSet(
            f"pgn/{name}",
            "torchvision",
            (name,),
            count,
            Sizes(train, None, test),
            f"torchvision's {kind}: --dataset-download fetches it",
            kind,
        )
        for name, kind, count, train, test in (
            ("cifar10", "CIFAR10", 10, 50000, 10000),
            ("cifar100", "CIFAR100", 100, 50000, 10000),
            ("svhn", "SVHN", 10, 73257, 26032),
        )
    ),
)
# name of the paper's task -> further names of its folder, classes, group, test images
_VTAB = (
    ("caltech101", (), 102, "natural", 6084),
    ("cifar100", ("cifar",), 100, "natural", 10000),
    ("dtd", (), 47, "natural", 1880),
    ("flowers102", ("oxford_flowers102",), 102, "natural", 6149),
    ("pets", ("oxford_iiit_pet", "oxford_pet"), 37, "natural", 3669),
    ("svhn", (), 10, "natural", 26032),
    ("sun397", (), 397, "natural", 21750),
    ("patch_camelyon", (), 2, "specialized", 32768),
    ("eurosat", (), 10, "specialized", 5400),
    ("resisc45", (), 45, "specialized", 6300),
    ("retinopathy", ("diabetic_retinopathy",), 5, "specialized", 42670),
    ("clevr_count", (), 8, "structured", 15000),
    ("clevr_dist", (), 6, "structured", 15000),
    ("dmlab", (), 6, "structured", 22735),
    ("kitti", (), 4, "structured", 711),
    ("dsprites_loc", (), 16, "structured", 73728),
    ("dsprites_ori", (), 16, "structured", 73728),
    ("smallnorb_azi", (), 18, "structured", 12150),
    ("smallnorb_ele", (), 9, "structured", 12150),
)
_LISTS = (
    "this task of VTAB-1k as github.com/ZhangYuanhan-AI/NOAH lays it out: train800.txt, "
    "val200.txt, train800val200.txt, test.txt and images/"
)
# name, folder, classes, folder of the images in it, sizes
_FGVC = (
    ("cub", ("CUB_200_2011", "cub"), 200, "images", (5394, 600, 5794)),
    ("nabirds", ("nabirds",), 555, "images", (21536, 2393, 24633)),
    ("flowers", ("OxfordFlowers", "flowers102"), 102, "", (1020, 1020, 6149)),
    ("dogs", ("StanfordDogs", "dogs"), 120, "Images", (10800, 1200, 8580)),
    ("cars", ("StanfordCars", "cars"), 196, "", (7329, 815, 8041)),
)
_SPLITS = "images, and train.json, val.json and test.json of the splits of github.com/KMnP/vpt"

DATA_SETS: dict[str, DataSet] = {
    row.name: row
    for row in (
        *_PGN,
        *(
            DataSet(
                f"vtab/{name}",
                "lists",
                (*names, name),
                count,
                Sizes(800, 200, test),
                _LISTS,
                group=group,
            )
            for name, names, count, group, test in _VTAB
        ),
        *(
            DataSet(f"fgvc/{name}", "fgvc", folders, count, Sizes(*sizes), _SPLITS, images)
            for name, folders, count, images, sizes in _FGVC
        ),
    )
}
SUITES = tuple(dict.fromkeys(row.suite for row in DATA_SETS.values()))
