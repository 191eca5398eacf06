"""Image classifiers of timm, torchvision and Hugging Face by name, as modules of images in [0, 1], and their images."""

from .huggingface import from_huggingface
from .images import images_for
from .model import Geometry, ImageArchitecture, ImageModel
from .timm_models import from_timm
from .torchvision_models import from_torchvision

__all__ = ["Geometry", "ImageArchitecture", "ImageModel", "from_huggingface", "from_timm", "from_torchvision"]
__all__ += ["images_for"]
