"""Networks made ready to be used: norms folded away, and files that other engines run."""

from .engine_form import engine_form as engine_form
from .export_check import ExportMismatch as ExportMismatch
from .export_check import InputDifference as InputDifference
from .export_check import check_export as check_export
from .export_facts import Facts as Facts
from .exported_files import Exported as Exported
from .exported_files import ExportedNetwork as ExportedNetwork
from .exported_files import is_exported as is_exported
from .exported_files import open_exported as open_exported
from .exporting import Export as Export
from .exporting import export as export
from .formats import FORMATS as FORMATS
from .formats import ExportFormat as ExportFormat
from .formats import Opened as Opened
from .formats import format_of as format_of
from .formats import get_format as get_format
from .formats import register_format as register_format
from .fusing import foldable as foldable
from .fusing import fuse as fuse
