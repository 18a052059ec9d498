"""
The toolbox around MC-LLaVA's remote code, and the names of that code.

The remote code is stored once, in the root of the repository, where the Hub expects it; a wheel has it inside this
package. Either way its files are modules of this package, `mc_llava.modeling_mc_llava` and so on, and what they export
can be imported from here. Everything is loaded on first use: `mc-llava --help` needs no torch.
"""

import ast
import sys
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..configuration_mc_llava import *  # noqa: F403
    from ..crops_mc_llava import *  # noqa: F403
    from ..encoded_images_mc_llava import *  # noqa: F403
    from ..feature_cache_mc_llava import *  # noqa: F403
    from ..generation_mc_llava import *  # noqa: F403
    from ..hashing_mc_llava import *  # noqa: F403
    from ..image_costs_mc_llava import *  # noqa: F403
    from ..image_loading_mc_llava import *  # noqa: F403
    from ..image_pixels_mc_llava import *  # noqa: F403
    from ..image_processing_mc_llava import *  # noqa: F403
    from ..modeling_mc_llava import *  # noqa: F403
    from ..precision_mc_llava import *  # noqa: F403
    from ..prefix_cache_mc_llava import *  # noqa: F403
    from ..processing_mc_llava import *  # noqa: F403
    from ..resizing_mc_llava import *  # noqa: F403
    from ..threads_mc_llava import *  # noqa: F403
    from ..zoom_mc_llava import *  # noqa: F403
    from ..zoom_plan_mc_llava import *  # noqa: F403

# The remote code, each file after those that it imports: the first six need neither torch nor transformers.
ROOT_FILES = (
    "crops_mc_llava",
    "zoom_plan_mc_llava",
    "image_costs_mc_llava",
    "image_pixels_mc_llava",
    "image_loading_mc_llava",
    "threads_mc_llava",
    "configuration_mc_llava",
    "resizing_mc_llava",
    "encoded_images_mc_llava",
    "image_processing_mc_llava",
    "precision_mc_llava",
    "hashing_mc_llava",
    "feature_cache_mc_llava",
    "processing_mc_llava",
    "prefix_cache_mc_llava",
    "generation_mc_llava",
    "zoom_mc_llava",
    "modeling_mc_llava",
)
# The folder of these files, of `tiny` and of the endpoint's handler.
_here = Path(__file__).parent
ROOT = _here if (_here / f"{ROOT_FILES[0]}.py").exists() else _here.parent


class _RootFinder:
    """Finds the root's files, and nothing else of the root, as modules of this package."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        if package == __name__ and module in ROOT_FILES:
            return spec_from_file_location(name, ROOT / f"{module}.py")
        return None


if ROOT != _here:
    sys.meta_path.append(_RootFinder)


@cache
def _exports() -> dict[str, str]:
    """Each name that the root's files export, and its file. They are read, not imported."""
    found = {}
    for file in ROOT_FILES:
        tree = ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8"))
        (names,) = (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]
        )
        found |= dict.fromkeys(names, file)
    return found


def __getattr__(name: str):
    if name in ROOT_FILES:
        return import_module(f"{__name__}.{name}")
    if name == "__all__":
        return [*ROOT_FILES, *_exports()]
    if name in _exports():
        return getattr(import_module(f"{__name__}.{_exports()[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *ROOT_FILES, *_exports()})
