"""Stands in for ``detectron2.utils.file_io``.

Left out: OneDrive links and the ``detectron2://`` prefix of the model zoo.
"""

from iopath.common.file_io import HTTPURLHandler
from iopath.common.file_io import PathManager as _PathManager

# A manager of our own, so that handlers registered by other libraries do not change our paths.
PathManager = _PathManager()
PathManager.register_handler(HTTPURLHandler())
