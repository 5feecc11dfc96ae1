"""The command line, `randbatch COMMAND`: a file for each command, and their table in `app`."""

from randbatch.cli.app import COMMANDS, main
from randbatch.cli.command import Command

__all__ = ["COMMANDS", "Command", "main"]
