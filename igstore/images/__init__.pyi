from igstore.images.image_list import (
    ImageList as ImageList,
    as_image_list as as_image_list,
    find_images as find_images,
    fingerprint as fingerprint,
)
from igstore.images.imagenet import synsets as synsets
from igstore.images.preparation import prepare as prepare, resized_size as resized_size
