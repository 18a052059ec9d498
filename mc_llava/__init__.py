"""The toolbox around MC-LLaVA's four files of remote code, which it offers as they are."""

from pathlib import Path


# The remote code stands once, in the root of the repository, as the Hub wants it. A wheel carries it inside of this
# package; in a checkout it lies one folder up.
if not (Path(__file__).parent / "modeling_mc_llava.py").exists():
    __path__.append(str(Path(__file__).parent.parent))

from .configuration_mc_llava import MCLlavaConfig
from .image_processing_mc_llava import MCLlavaImageProcessor
from .modeling_mc_llava import EncodedImages, MCLlavaForConditionalGeneration
from .processing_mc_llava import FeatureCache, MCLlavaProcessor


__all__ = [
    "EncodedImages",
    "FeatureCache",
    "MCLlavaConfig",
    "MCLlavaForConditionalGeneration",
    "MCLlavaImageProcessor",
    "MCLlavaProcessor",
]
