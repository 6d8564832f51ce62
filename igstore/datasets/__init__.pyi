from igstore.datasets.masked_batches import MaskedBatch as MaskedBatch, MaskedBatches as MaskedBatches
from igstore.datasets.masked_imagenet import MaskedImageNet as MaskedImageNet
from igstore.datasets.masked_images import Images as Images, MaskedImages as MaskedImages
from igstore.datasets.pixels import find_pixels as find_pixels, open_pixels as open_pixels
from igstore.datasets.xarray_views import keep_mask as keep_mask, masked_view as masked_view, open_store as open_store
