"""The list of a dataset's images that every reader returns: path, class and split of each image."""

from typing import NamedTuple

from etils import epath

TRAIN, TEST, QUERY, GALLERY = SPLITS = ("train", "test", "query", "gallery")


class Row(NamedTuple):
    """An image of a dataset.

    Attributes:
      path: its path from the dataset's root folder, with "/".
      label: its class, an integer from 0.
      split: one of SPLITS. A dataset has either train and test, or train, query and gallery.
      super_label: the super class of its class, an integer from 0; 0 where there are none.
      group: the name of its group, which a query does not search: the same camera, sequence or
        product shot; "" where it has none.
      image_id: the name of what it shows, where several files are the same image; "" where it has
        none.
    """

    path: str
    label: int
    split: str
    super_label: int = 0
    group: str = ""
    image_id: str = ""


class Listing(NamedTuple):
    """The images under a folder.

    Attributes:
      root: the folder that the rows' paths start from.
      rows: the images.
    """

    root: epath.Path
    rows: list[Row]
