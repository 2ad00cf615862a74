"""The list of a dataset's images that every reader returns: path, class and split of each image."""

from typing import NamedTuple

from etils import epath

TRAIN, TEST, QUERY, GALLERY = SPLITS = ("train", "test", "query", "gallery")


class Row(NamedTuple):
    """An image of a dataset.

    Attributes:
      path: its path from the dataset's root folder, with "/".
      label: its class, an integer from 0.
      split: one of SPLITS. A test image is both query and gallery.
      super_label: the super class of its class, an integer from 0; 0 where there are none.
      group: the name of its group, which a query does not search: the same camera, sequence or
        product shot; "" where it has none.
      image_id: the name of what it shows, where several files are the same image; "" where it has
        none.
      box: (left, top, right, bottom) in pixels: the image is what the upright picture has there;
        None: all of it.
    """

    path: str
    label: int
    split: str
    super_label: int = 0
    group: str = ""
    image_id: str = ""
    box: tuple[int, int, int, int] | None = None

    @property
    def name(self) -> str:
        """The path; and the box, as a picture may have several."""
        return self.path if self.box is None else f"{self.path} [{self.box_text}]"

    @property
    def box_text(self) -> str:
        """The box as "10,20,110,220"; "" where there is none."""
        return "" if self.box is None else ",".join(map(str, self.box))


class Listing(NamedTuple):
    """The images under a folder.

    Attributes:
      root: the folder that the rows' paths start from.
      rows: the images.
    """

    root: epath.Path
    rows: list[Row]
