"""torchvision's data set classes, also where its compiled operators do not load."""

import importlib
import sys
from types import ModuleType

from utils.errors import UserError

_declared = None   # the library must outlive the import, or its operators are taken back


def datasets() -> ModuleType:
    """The module `torchvision.datasets`, imported on the first call (about two seconds).

    A torchvision built for another torch (a CUDA build beside a CPU torch) cannot load its operators, and its
    import stops at registering `torchvision::nms`.  The data sets need no operator: then, and only then, the
    missing ones are declared and the import is tried again.  Raises UserError without torchvision.
    """
    global _declared
    try:
        return importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise UserError(f"torchvision is missing ({error}): pip install -r requirements.txt") from None
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared is not None:
            raise
    import torch

    # what the failed import left behind would be taken for the real modules
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declared = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.datasets")
