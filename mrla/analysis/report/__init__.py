"""The page that a comparison or an explanation is handed on as."""

from .page import write_report as write_report
