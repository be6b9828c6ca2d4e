"""CIFAR-100: 50,000 training and 10,000 test images, 32x32 RGB, 100 fine classes.

Krizhevsky, 2009. The 20 coarse classes are not used.
"""

from advmoe_jax.data import cifar_files, raw
from advmoe_jax.data.source import Dataset, Known, read_prepared

_CLASS_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""

OFFICIAL = raw.Official(
    name="cifar100",
    class_names=tuple(_CLASS_NAMES.split()),
    urls=(cifar_files.SITE + "/cifar-100-binary.tar.gz",),
    archives={
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    },
    layouts=(
        cifar_files.binary(
            folder="cifar-100-binary",
            train={"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
            test={"test.bin": "4499cfba6c016c1be1438163640a0898"},
            label_bytes=2,
        ),
        cifar_files.pickled(
            folder="cifar-100-python",
            train={"train": "16019d7e3df5f24257cddd939b257f8d"},
            test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            label_key="fine_labels",
        ),
    ),
)
KNOWN = Known(len(OFFICIAL.class_names), (32, 32, 3))


def dataset(root: str, variant: str = "") -> Dataset:
    """Reads ROOT/cifar100/, which `python -m advmoe_jax.data.prepare cifar100` writes."""
    return read_prepared("cifar100", root, variant)
