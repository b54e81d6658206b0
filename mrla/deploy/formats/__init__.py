"""Formats of export: a class and a file each, and the table that all of this package reads them from.

Messages list the formats in the order in which they are imported here.
"""

from .contract import FORMATS as FORMATS
from .contract import ExportFormat as ExportFormat
from .contract import Opened as Opened
from .contract import checked_format as checked_format
from .contract import format_of as format_of
from .contract import get_format as get_format
from .contract import register_format as register_format

# isort: off
from .onnx import OnnxFormat as OnnxFormat
from .torch_export import TorchExportFormat as TorchExportFormat
from .openvino import OpenVinoFormat as OpenVinoFormat
# isort: on
