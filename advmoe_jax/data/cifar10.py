"""CIFAR-10: 50,000 training and 10,000 test images, 32x32 RGB, 10 classes (Krizhevsky, 2009)."""

from advmoe_jax.data import cifar_files, raw
from advmoe_jax.data.source import Dataset, Known, read_prepared

OFFICIAL = raw.Official(
    name="cifar10",
    class_names=("airplane", "automobile", "bird", "cat", "deer",
                 "dog", "frog", "horse", "ship", "truck"),
    urls=(cifar_files.SITE + "/cifar-10-binary.tar.gz",),
    archives={
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    },
    layouts=(
        cifar_files.binary(
            folder="cifar-10-batches-bin",
            train={
                "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            },
            test={"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
            label_bytes=1,
        ),
        cifar_files.pickled(
            folder="cifar-10-batches-py",
            train={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            test={"test_batch": "40351d587109b95175f43aff81a1287e"},
            label_key="labels",
        ),
    ),
)
KNOWN = Known(len(OFFICIAL.class_names), (32, 32, 3))


def dataset(root: str, variant: str = "") -> Dataset:
    """Reads ROOT/cifar10/, which `python -m advmoe_jax.data.prepare cifar10` writes."""
    return read_prepared("cifar10", root, variant)
