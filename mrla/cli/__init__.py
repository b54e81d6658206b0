"""The commands: parse, call, print."""

from .main import COMMANDS as COMMANDS
from .main import main as main
from .printing import print_benchmark as print_benchmark
from .printing import print_comparison as print_comparison
